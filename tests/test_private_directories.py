"""Who can put a program where: owners, modes, links and every directory above."""

import os

import pytest

from gcnet_jax.errors import UserError
from gcnet_jax.private_directories import is_own_file, private_directory, who_else_can_write


def test_a_new_directory_is_the_users_alone(tmp_path):
    place = private_directory(tmp_path / 'a' / 'b')
    assert place.stat().st_mode & 0o777 == 0o700
    assert who_else_can_write(place) == ''
    assert private_directory(place) == place


@pytest.mark.parametrize('mode', [0o702, 0o722, 0o777, 0o1777])
def test_a_directory_that_others_write_to_is_refused(tmp_path, mode):
    """The sticky bit keeps others from renaming what is there, not from adding to it."""
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a').chmod(mode)
    with pytest.raises(UserError, match=r'others can write to .*/a; remove it or change'):
        private_directory(tmp_path / 'a')


@pytest.mark.parametrize(('mode', 'refused'), [(0o777, True), (0o1777, False), (0o755, False)])
def test_so_is_one_below_it_but_for_the_sticky_bit(tmp_path, mode, refused):
    place = private_directory(tmp_path / 'a' / 'b')
    (tmp_path / 'a').chmod(mode)
    assert bool(who_else_can_write(place)) == refused


def test_where_a_link_leads_to_is_looked_at(tmp_path):
    open_to_all = tmp_path / 'open' / 'inner'
    open_to_all.mkdir(parents=True)
    (tmp_path / 'open').chmod(0o777)
    (tmp_path / 'link').symlink_to(open_to_all)
    assert 'others can write to' in who_else_can_write(tmp_path / 'link')


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can give files away')
def test_what_belongs_to_another_user_is_refused(tmp_path):
    place = private_directory(tmp_path / 'a' / 'b')
    os.chown(tmp_path / 'a', 12345, -1)
    assert 'belongs to another user' in who_else_can_write(place)
    file = tmp_path / 'file'
    file.write_text('')
    assert is_own_file(file)
    os.chown(file, 12345, -1)
    assert not is_own_file(file)


def test_own_files_are_regular_and_closed_to_others(tmp_path):
    file, link = tmp_path / 'file', tmp_path / 'link'
    file.write_text('')
    link.symlink_to(file)
    assert is_own_file(file)
    assert not is_own_file(link)
    assert not is_own_file(tmp_path)
    file.chmod(0o602)
    assert not is_own_file(file)


def test_a_place_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot use .*: Not a directory'):
        private_directory(tmp_path / 'file' / 'inner')
