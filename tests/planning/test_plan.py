"""Plans of a small network, compiled for the eight CPU devices where something is compiled."""

import dataclasses
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from gcnet_jax.commands.config_files import load_config
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.planning import plan as planning
from gcnet_jax.planning.chips import PlanError

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.fixture
def eight_cpus(monkeypatch):
    """Eight devices that are here take the place of the TPU's."""
    monkeypatch.setattr(planning, 'topology_devices', lambda name: jax.devices())


def test_bounds(example_plan):
    assert example_plan.batch_per_chip == 100
    bounds = example_plan.bounds()
    assert bounds['arithmetic_seconds'] == pytest.approx(0.25)
    assert bounds['memory_seconds'] == pytest.approx(0.5)
    assert bounds['bound_by'] == 'memory'
    assert bounds['images_per_second'] == pytest.approx(800)
    assert bounds['mfu'] == pytest.approx(0.5)


def test_bounds_of_much_arithmetic(example_plan, make_program):
    program = make_program(flops=197e12, hbm_bytes=round(819e6))
    bounds = dataclasses.replace(example_plan, program=program).bounds()
    assert bounds['bound_by'] == 'arithmetic'
    assert bounds['images_per_second'] == pytest.approx(400)
    assert bounds['mfu'] == 1


def test_memory_counts_the_new_state_once(make_program):
    assert make_program().memory == (5 + 4 + 3 + 2 - 1) * 2**30


@pytest.mark.parametrize(
    ('message', 'needed'),
    [
        ('temporaries (512.00G) exceeds available HBM (15.75G).', 512 * 2**30),
        ('Used 20.54G of 15.75G hbm. Exceeded by 4.79G.', round(20.54 * 2**30)),
        ('used 900.5M of 100.0M', round(900.5 * 2**20)),
        ('it is too large', None),
    ],
)
def test_what_a_program_needs_that_does_not_fit(message, needed):
    assert planning.OutOfMemory(message).needed_bytes == needed


@pytest.mark.parametrize('start', [1, 8, 100, 256, 4096])
@pytest.mark.parametrize('most', [8, 16, 24, 250, 256, 263, 1000])
def test_the_largest_batch_is_found(start, most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= most

    assert planning.largest_batch(fits, start) == most // 8 * 8
    assert all(size % 8 == 0 and size > 0 for size in tried)
    assert len(set(tried)) == len(tried)
    assert len(tried) <= 20


def test_no_batch_fits():
    assert planning.largest_batch(lambda size: False, 256) == 0


@pytest.mark.parametrize('name', ['imagenet', 'finetune', 'cifar10', 'folder', 'digits'])
def test_a_config_is_described_without_its_data(name, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError('the data set was opened')

    monkeypatch.setattr('gcnet_jax.data.sources.load_source', refuse)
    monkeypatch.setattr('gcnet_jax.training.experiment.check_shapes', lambda built: None)
    tree = load_config(str(CONFIGS / f'{name}.py'))
    if name == 'finetune':
        tree.model.name = 'gc_resnet50'  # The checkpoint's, where there is one.
    if name in ('folder', 'finetune'):
        tree.model.num_classes = 5
    else:
        tree.data.data_dir = str(tmp_path)
    built = planning.describe(tree, jax.devices(), 64)
    classes = {'imagenet': 1000, 'finetune': 5, 'folder': 5}
    assert built.task.num_classes == classes.get(name, 10)
    assert built.config.training.batch_size == 64
    assert built.model.context
    assert not planning.describe(tree, jax.devices(), 64, with_context=False).model.context
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['segmentation', 'cityscapes'])
def test_a_segmenter_is_described_with_and_without_the_context_in_its_head(name, monkeypatch):
    monkeypatch.setattr('gcnet_jax.training.experiment.check_shapes', lambda built: None)
    tree = load_config(str(CONFIGS / f'{name}.py'))
    tree.model.num_classes = 19
    tree.model.backbone = 'gc_resnet18'
    built = planning.describe(tree, jax.devices(), 64)
    assert built.task.num_classes == 19
    assert built.model.context_ratio
    assert built.model.backbone.context
    plain = planning.describe(tree, jax.devices(), 64, with_context=False)
    assert plain.model.context_ratio is None
    assert not plain.model.backbone.context


def test_an_unknown_data_set_says_how_to_plan_anyway(small_config, tmp_path):
    small_config.data.name, small_config.data.data_dir = 'my_flowers', str(tmp_path)
    with pytest.raises(DataError, match=r'--config\.model\.num_classes=NUMBER') as raised:
        planning.describe(small_config, jax.devices(), 64)
    assert 'my_flowers' in str(raised.value)
    small_config.model.num_classes = 5
    assert planning.describe(small_config, jax.devices(), 64).task.num_classes == 5


def test_the_mesh_is_of_the_devices_given(small_config):
    devices = jax.devices()[2:4]
    assert list(planning.describe(small_config, devices, 64).mesh.devices.flat) == devices


@pytest.mark.parametrize(
    ('setting', 'value', 'message'),
    [
        ('mesh.spatial', 3, 'does not fit 8 devices'),
        ('training.accumulation_steps', 3, 'does not divide'),
        ('model.name', 'gc_resnet5', 'did you mean'),
        ('optimizer.weight_decay', -1.0, 'optimizer.weight_decay is -1.0'),
    ],
)
def test_a_config_that_cannot_work_is_refused(small_config, setting, value, message):
    group, key = setting.split('.')
    small_config[group][key] = value
    with pytest.raises(ConfigError, match=message):
        planning.describe(small_config, jax.devices(), 64)


@pytest.mark.parametrize(
    'training',
    [{'total_steps': 3, 'total_epochs': 9.0}, {'total_steps': None, 'total_epochs': 0.1}],
)
def test_durations_that_depend_on_the_images_refuse_no_plan(small_config, training):
    small_config.training.update(training)
    small_config.schedule.warmup_epochs = 5.0
    planning.describe(small_config, jax.devices(), 64)


def test_balanced_class_weights_need_no_images(small_config):
    small_config.task.class_weights = 'balanced'
    built = planning.describe(small_config, jax.devices(), 64)
    assert len(built.task.class_weights) == built.task.num_classes


@pytest.fixture(scope='module')
def small_plan(make_small_config):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(planning, 'topology_devices', lambda name: jax.devices())
        return planning.make_plan(make_small_config(), 'v5e:2x4', 2)


def test_the_real_step_is_compiled(small_plan):
    assert (small_plan.chips, small_plan.batch_size, small_plan.batch_per_chip) == (8, 16, 2)
    program = small_plan.program
    # The gradients, and forward the sums of values and squares of three norms of eight channels;
    # with what goes with them backward, a tenth more at most.
    gradients = 4 * small_plan.parameters
    reduced = program.traffic.collectives['all-reduce']
    assert gradients + 3 * 2 * 8 * 4 <= reduced.bytes <= 1.1 * gradients
    assert set(program.traffic.collectives) == {'all-reduce'}
    # Whole parameters, momentum and statistics on each device, and two images of 8x8 pixels.
    state = 4 * (2 * small_plan.parameters + 2 * 3 * 8)
    assert state < program.arguments < state + 2 * (8 * 8 * 3 + 4) + 200
    assert program.aliased >= state
    assert program.flops > 2 * small_plan.parameters
    assert small_plan.needed_bytes == program.memory > state
    assert program.compile_seconds > 0
    assert small_plan.twin is None


def test_the_twin_is_the_network_without_context(small_plan, small_config, eight_cpus):
    plan = planning.add_twin(small_plan, small_config)
    # The pooling's logit, and the bottleneck's two layers and norm.
    assert plan.parameters - plan.twin_parameters == (8 + 1) + (8 * 4 + 4) + 2 * 4 + (4 * 8 + 8)
    assert plan.twin.flops < plan.program.flops
    assert plan.without_context().parameters == plan.twin_parameters
    assert plan.without_context().bounds()['images_per_second'] > 0


def test_a_network_without_context_has_no_twin(example_plan, small_config, eight_cpus):
    tree = small_config.to_dict()
    tree['model']['context'] = None
    assert planning.add_twin(example_plan, ConfigDict(tree)) is example_plan


def test_micro_batches_count_each(small_plan, small_config, eight_cpus):
    small_config.training.accumulation_steps = 4
    parts, whole = planning.make_plan(small_config, 'v5e:2x4', 8).program, small_plan.program
    assert parts.flops == pytest.approx(4 * whole.flops, rel=0.1)
    # The statistics of every micro-batch, and the gradients.
    statistics = 4 * (whole.traffic.collectives['all-reduce'].bytes - 4 * small_plan.parameters)
    reduced = parts.traffic.collectives['all-reduce'].bytes
    assert reduced >= statistics + 4 * small_plan.parameters - 100
    assert parts.traffic.unknown_loops == 0


class Refusing:
    """Takes the place of the compiled step's jit: compiling it ends in an error."""

    def __init__(self, message):
        self.message = message

    def __call__(self, *arguments):
        return self

    def lower(self, *arguments):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_what_does_not_fit_is_a_plan_all_the_same(small_config, eight_cpus, monkeypatch):
    refusing = Refusing('RESOURCE_EXHAUSTED: HLO temporaries (20.00G) exceed (15.75G)')
    monkeypatch.setattr(planning, 'jit_train_step', refusing)
    plan = planning.make_plan(small_config, 'v5e:2x4')
    assert plan.program is None
    assert plan.needed_bytes == 20 * 2**30
    assert plan.batch_size == small_config.training.batch_size


def test_other_compiler_errors_are_not_hidden(small_config, eight_cpus, monkeypatch):
    monkeypatch.setattr(planning, 'jit_train_step', Refusing('INTERNAL: what is this'))
    with pytest.raises(jax.errors.JaxRuntimeError, match='what is this'):
        planning.make_plan(small_config, 'v5e:2x4')


def test_a_batch_below_one_is_refused(small_config):
    with pytest.raises(ConfigError, match='it must be 1 or more'):
        planning.make_plan(small_config, 'v5e:2x4', 0)


@pytest.fixture
def pretend_plans(monkeypatch, example_plan):
    """Plans are made up: up to 40 images a chip fit. Returns what was asked for."""
    asked = []

    def make(config, topology, batch_per_chip=None):
        asked.append((topology, batch_per_chip))
        fits = (batch_per_chip or 16) <= 40
        return dataclasses.replace(
            example_plan, topology=topology, program=example_plan.program if fits else None
        )

    def add_twin(plan, config, compiling):
        asked.append((plan.topology, 'twin'))
        return dataclasses.replace(plan, twin=plan.program)

    monkeypatch.setattr(planning, 'make_plan', make)
    monkeypatch.setattr(planning, 'add_twin', add_twin)
    return asked


def test_the_twin_is_compiled_for_one_topology(pretend_plans, small_config):
    told = []
    plans = planning.make_plans(small_config, ['v5e:1x1', 'v5e:4x4'], tell=told.append)
    assert pretend_plans == [('v5e:1x1', None), ('v5e:1x1', 'twin'), ('v5e:4x4', None)]
    assert [plan.twin is not None for plan in plans] == [True, False]
    assert [plan.topology for plan in told] == ['v5e:1x1', 'v5e:4x4']


def test_the_twin_is_compiled_where_the_step_fits(pretend_plans, small_config):
    planning.make_plans(small_config, ['v5e:1x1'], 64)
    assert pretend_plans == [('v5e:1x1', 64)]


def test_all_topologies_are_checked_first(pretend_plans):
    with pytest.raises(PlanError, match='v5e:5'):
        planning.make_plans({}, ['v5e:1x1', 'v5e:5'])
    assert pretend_plans == []


def test_the_plan_with_the_largest_batch(pretend_plans, small_config):
    told = []
    plans = planning.make_plans(small_config, ['v5e:2x2'], find_largest=True, tell=told.append)
    # 64 images over four chips, then twice that, then between what fitted and what did not.
    sizes = [size for _, size in pretend_plans]
    assert sizes == [16, 32, 64, 48, 40, 'twin']
    assert plans[0].program is not None
    assert len(told) == 5


def test_where_nothing_fits_there_is_no_largest_batch(small_config, monkeypatch, example_plan):
    nothing = dataclasses.replace(example_plan, program=None)
    monkeypatch.setattr(planning, 'make_plan', lambda *arguments: nothing)
    with pytest.raises(PlanError, match='not even 8 images a chip fit'):
        planning.make_plans(small_config, ['v5e:1x1'], find_largest=True)
