"""Pictures of attention, by what is in the figure: where the colours are, and what is written."""

import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gcnet_jax.analysis import draw_attention, draw_queries, save_figure
from gcnet_jax.analysis.pictures import COLORMAP, OPACITY, group_by_stage, overlay
from gcnet_jax.errors import ConfigError, UserError

GREY = np.full((40, 60, 3), 100, np.uint8)


def one_hot(height, width, row, column):
    attention = np.zeros((height, width), np.float32)
    attention[row, column] = 1.0
    return attention


def texts(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()] + [
        text.get_text() for text in figure.texts
    ]


def panels(figure):
    return [axes for axes in figure.axes if axes.get_images()]


def test_overlay_is_brightest_where_the_map_is_and_grey_elsewhere():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    # 4 x 6 cells of 10 pixels: cell (1, 4) has its middle between the pixels 14 and 15, 44 and 45.
    pixels = overlay(image, one_hot(4, 6, 1, 4), 1.0).astype(float)
    colours = matplotlib.colormaps[COLORMAP]([0.0, 1.0])[:, :3] * 255
    grey = np.asarray(Image.fromarray(image).convert('L'), float)
    low = OPACITY[0] * colours[0] + (1 - OPACITY[0]) * grey[35, 5]
    np.testing.assert_allclose(pixels[35, 5], low, atol=1)
    # Bilinear: half a pixel beside the middle of the cell the value is 0.95 in each direction.
    value = 0.95**2
    opacity = OPACITY[0] + value * (OPACITY[1] - OPACITY[0])
    colour = np.asarray(matplotlib.colormaps[COLORMAP](value)[:3]) * 255
    expected = opacity * colour + (1 - opacity) * grey[14, 44]
    np.testing.assert_allclose(pixels[14, 44], expected, atol=2)
    assert np.argmax(pixels.sum(-1).reshape(4, 10, 6, 10).mean((1, 3))) == 1 * 6 + 4


def test_overlay_scales_to_the_peak_and_takes_a_map_of_zeros():
    half = overlay(GREY, np.full((2, 2), 0.5, np.float32), 1.0)
    np.testing.assert_array_equal(half, overlay(GREY, np.full((2, 2), 1.5, np.float32), 3.0))
    assert len(np.unique(overlay(GREY, np.zeros((2, 2), np.float32), 0.0).reshape(-1, 3))) <= 3


def test_blocks_are_grouped_by_the_first_name_and_the_size():
    maps = {
        'stage3_10/c/pool': np.ones((2, 2)),
        'stage3_2/c/pool': np.ones((2, 2)),
        'stage2_0/c/pool': np.ones((4, 4)),
        'stage4_0/c/pool': np.ones((2, 2)),
        'Conv_0/context/pool': np.ones((8, 8)),
        'Conv_1/context/pool': np.ones((3, 3)),
    }
    assert group_by_stage(maps) == [
        ['Conv_0/context/pool'],
        ['stage2_0/c/pool'],
        ['Conv_1/context/pool'],
        ['stage3_2/c/pool', 'stage3_10/c/pool'],
        ['stage4_0/c/pool'],
    ]


STAGES = {f'stage2_{index}/context_0/pool': one_hot(4, 6, index, 2) for index in range(3)}
STAGES['stage3_0/context_0/pool'] = np.full((2, 3), 1 / 6, np.float32)


def test_a_panel_for_the_last_block_of_each_stage_with_its_name_size_and_peak():
    figure = draw_attention(GREY, STAGES, title='a $strange_ name')
    assert len(panels(figure)) == 3
    written = texts(figure)
    assert 'what the network saw\n40 x 60' in written
    assert 'stage2_2\ncontext_0\n4 x 6, peak 24 x uniform' in written
    assert 'stage3_0\ncontext_0\n2 x 3, peak 1.00 x uniform' in written
    assert 'a $strange_ name' in written
    assert any('multiple of uniform attention' in text for text in written)
    scales = [axes.get_xlim() for axes in figure.axes if not axes.get_images()]
    np.testing.assert_allclose(scales, [(0, 24), (0, 1)], rtol=1e-6)


def test_the_numbers_of_neighbouring_scales_do_not_touch():
    nearly_uniform = np.full((4, 6), 1 / 24, np.float32)
    nearly_uniform[0, 0] *= 1.02
    figure = draw_attention(GREY, {f'stage{index}/c/pool': nearly_uniform for index in (1, 2, 3)})
    figure.draw_without_rendering()
    labels = [
        label
        for axes in figure.axes
        if not axes.get_images()
        for label in axes.get_xticklabels()
        if axes.get_xlim()[0] <= label.get_position()[0] <= axes.get_xlim()[1]
    ]
    assert labels[0].get_text() == '0'
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert len(boxes) == 3 * 5
    assert all(left.x1 + 3 < right.x0 for left, right in itertools.pairwise(boxes))


def test_the_panels_show_the_maps_in_their_places():
    figure = draw_attention(GREY, STAGES)
    pixels = panels(figure)[1].get_images()[0].get_array().sum(-1)
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    assert int(row / pixels.shape[0] * 4) == 2
    assert int(column / pixels.shape[1] * 6) == 2


def test_every_block_has_a_panel_and_every_stage_a_row():
    figure = draw_attention(GREY, STAGES, all_blocks=True)
    found = panels(figure)
    assert len(found) == 4 + 2  # The image stands at the head of each row.
    bottoms = [round(axes.get_position().y0, 3) for axes in found]
    assert bottoms[0] == bottoms[1] == bottoms[2] == bottoms[3] > bottoms[4] == bottoms[5]


def test_a_long_stage_is_broken_into_rows_and_nothing_overlaps():
    maps = {f'stage3_{index}/context_0/pool': one_hot(4, 6, 0, 0) for index in range(23)}
    figure = draw_attention(GREY, maps, all_blocks=True)
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(panels(figure)) == 23 + 4
    for index, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_queries_have_a_panel_each_one_scale_and_a_mark():
    maps = np.zeros((4, 6, 4, 6), np.float32)
    maps[:, :, 3, 5] = 0.5
    maps[0, 0, 3, 5] = 1.0
    figure = draw_queries(
        GREY, {'stage3_0/nl': maps}, queries=[(0, 0), (1, 1)], notes={'stage3_0/nl': 'a note'}
    )
    whole, first, second = panels(figure)
    written = texts(figure)
    assert 'stage3_0\nnl\nand the queries' in written
    assert 'query 1\n4 x 6, peak 24 x uniform' in written
    assert 'query 2\n4 x 6, peak 12 x uniform' in written
    assert 'a note' in written
    assert [axes.get_xlim() for axes in figure.axes if not axes.get_images()] == [(0, 24)] * 2
    brightest = [
        axes.get_images()[0].get_array().astype(int).sum(-1).max() for axes in (first, second)
    ]
    assert brightest[0] > brightest[1]
    # Rings: in the middle of the first cell, and of the last one.
    height, width = whole.get_images()[0].get_array().shape[:2]
    rings = [line.get_xydata()[0] for line in whole.get_lines()]
    np.testing.assert_allclose(rings[0], [width / 12 - 0.5, height / 8 - 0.5])
    np.testing.assert_allclose(rings[-1], [width * 11 / 12 - 0.5, height * 7 / 8 - 0.5])
    assert [text.get_text() for text in second.texts] == ['2']


def test_padding_is_left_out_and_the_map_keeps_its_place():
    image = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    maps = {'a/pool': one_hot(4, 6, 1, 2) * 0.5 + one_hot(4, 6, 3, 5) * 0.8}
    _, panel = panels(draw_attention(image, maps, shown=(260, 410)))
    whole = overlay(image, maps['a/pool'], 0.5)
    np.testing.assert_array_equal(panel.get_images()[0].get_array(), whole[:260, :410])
    figure = draw_attention(image, maps, shown=(260, 410))
    # The peak is that of the positions that are seen at least in part.
    assert 'a\n4 x 6, peak 12 x uniform' in texts(figure)
    assert 'what the network saw\n260 x 410' in texts(figure)


def test_queries_lie_in_what_is_shown():
    image = np.zeros((400, 600, 3), np.uint8)
    maps = np.zeros((4, 6, 4, 6), np.float32)
    maps[2, 4, 0, 0] = maps[0, 0, 3, 5] = 1
    figure = draw_queries(image, {'a': maps}, queries=[(1, 1), (0, 0)], shown=(260, 410))
    first, second = panels(figure)[1:]
    assert 'query 1\n4 x 6, peak 24 x uniform' in texts(figure)
    assert 'query 2\n4 x 6, peak 0.00 x uniform' in texts(figure)
    # In the middle of what is shown of the position: rows 200 to 260, columns 400 to 410.
    np.testing.assert_allclose(first.get_lines()[0].get_xydata()[0], [404.5, 229.5])
    np.testing.assert_allclose(second.get_lines()[0].get_xydata()[0], [49.5, 49.5])


def test_a_long_title_stays_inside():
    for length in (20, 400):
        figure = draw_attention(GREY, {'a/pool': one_hot(4, 6, 1, 2)}, title='a' * length)
        figure.draw_without_rendering()
        (title,) = (text for text in figure.texts if text.get_text().startswith('aa'))
        box = title.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: draw_attention(GREY / 255, STAGES), r'uint8 \[height, width, 3\].*got float64'),
        (lambda: draw_attention(GREY[None], STAGES), r'of shape \(1, 40, 60, 3\)'),
        (lambda: draw_attention(GREY, {}), 'there is no attention map to draw'),
        (lambda: draw_attention(GREY, STAGES, shown=(40, 61)), '40x60 pixels cannot be 40x61'),
        (
            lambda: draw_attention(GREY, {'a/pool': np.ones(3)}),
            r'a/pool: a map .* got shape \(3,\)',
        ),
        (lambda: draw_queries(GREY, {}), 'there is no attention map to draw'),
        (lambda: draw_queries(GREY, {'a': np.ones((2, 2))}), r'a: maps of queries are .*\(2, 2\)'),
        (lambda: draw_queries(GREY, {}, queries=[(0.5, 1.5)]), r'from 0 to 1, .* got 0\.5,1\.5'),
        (lambda: draw_queries(GREY, {}, queries=[(0.5,)]), r'a query is its row and its column'),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    figure = draw_attention(GREY, STAGES, title='日本')  # The font has no such letters.
    save_figure(figure, tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as image:
        assert image.size[0] > 600
    with pytest.raises(UserError, match=r'cannot write .*missing.*b\.png: No such file'):
        save_figure(figure, tmp_path / 'missing' / 'b.png')
    assert [path.name for path in tmp_path.iterdir()] == ['a.png']


def test_drawing_leaves_pyplot_alone():
    code = (
        'import sys, numpy as np\n'
        'from gcnet_jax.analysis import draw_attention\n'
        'assert not any(name.startswith("matplotlib") for name in sys.modules)\n'
        'draw_attention(np.zeros((4, 4, 3), np.uint8), {"a": np.ones((2, 2))})\n'
        'assert "matplotlib.pyplot" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_read_only_target_is_one_line(tmp_path, read_only):
    with pytest.raises(UserError, match=read_only) as caught:
        save_figure(Figure(), tmp_path / 'a.png')
    assert not isinstance(caught.value.__context__.__context__, OSError)
    with pytest.raises(ConfigError, match=r'--out s3://b/a.png is a URL; name a local path'):
        save_figure(Figure(), 's3://b/a.png')
