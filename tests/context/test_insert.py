"""Blocks inserted into three models that are not ours: compact, setup-style, and a small ResNet."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcnet_jax.context.global_context import GlobalContext
from gcnet_jax.context.insert import insert
from gcnet_jax.errors import ConfigError

KEY = jax.random.key(0, impl='rbg')
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
CONTEXT = GlobalContext(ratio=1 / 2)


class CNN(nn.Module):
    """The style of flax's MNIST example."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)


class Layered(nn.Module):
    """Submodules made in setup, in a list; one of them is called twice; a second method."""

    def setup(self):
        self.layers = [nn.Conv(4, (1, 1)) for _ in range(2)]
        self.shared = nn.Conv(4, (1, 1))
        self.head = nn.Dense(3)

    def encode(self, x, double=False):
        for layer in self.layers:
            x = layer(x)
        return self.shared(nn.relu(self.shared(x))) * (2 if double else 1)

    def classify(self, x):
        return self.head(x.mean((1, 2)))

    def __call__(self, x):
        return self.classify(self.encode(x))


class Bottleneck(nn.Module):
    conv: object
    norm: object

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm(name='bn1')(self.conv(4, (3, 3), name='conv1')(x)))
        y = self.norm(name='bn2')(self.conv(4, (3, 3), name='conv2')(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The style of flax's ImageNet example: partials bound once, BatchNorm."""

    block: type = Bottleneck
    depth: int = 2

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = conv(4, (3, 3), name='stem')(x)
        for index in range(self.depth):
            x = self.block(conv, norm, name=f'block{index}')(x)
        return nn.Dense(3, name='head')(x.mean((1, 2)))


class Shift(nn.Module):
    """A block whose effect is easy to compute: adds a parameter, one at the start."""

    @nn.compact
    def __call__(self, features):
        return features + self.param('shift', nn.initializers.ones, ())


class Double(nn.Module):
    """A block without parameters."""

    def __call__(self, features):
        return features * 2


MODELS = [
    pytest.param(CNN(), 'Conv_*', {}, ['Conv_0', 'Conv_1'], id='compact'),
    pytest.param(Layered(), 'layers_1', {}, ['layers_1'], id='setup'),
    pytest.param(
        ResNet(), 'block*/bn2', {'train': False}, ['block0/bn2', 'block1/bn2'], id='resnet'
    ),
]


def shapes(model, *args, **kwargs):
    return jax.eval_shape(functools.partial(model.init, **kwargs), KEY, *args)


def leaves(tree):
    return {
        '/'.join(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def places(variables, name='context'):
    """Paths of the modules that have a block."""
    return sorted(
        {
            path.removeprefix('params/').split(f'/{name}/')[0]
            for path in leaves(variables)
            if f'/{name}/' in path
        }
    )


@pytest.mark.parametrize(('model', 'pattern', 'options', 'expected'), MODELS)
def test_the_model_is_unchanged_at_the_start(model, pattern, options, expected):
    inserted = insert(model, pattern, CONTEXT)
    plain_variables = model.init(KEY, IMAGES, **options)
    variables = inserted.init(KEY, IMAGES, **options)
    assert places(variables) == expected

    ours = leaves(variables)
    for path, value in leaves(plain_variables).items():
        np.testing.assert_array_equal(ours.pop(path), value, err_msg=path)
    assert all('/context/' in path for path in ours)
    np.testing.assert_array_equal(
        inserted.apply(variables, IMAGES, **options),
        model.apply(plain_variables, IMAGES, **options),
    )


def test_the_block_is_applied_where_it_says(random_variables):
    inserted = insert(CNN(), 'Conv_1', Shift())
    variables = random_variables(inserted, IMAGES)
    p = jax.tree.map(np.float64, variables['params'])

    def conv(parameters, x):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        return np.einsum('nhwcij,ijcd->nhwd', windows, parameters['kernel']) + parameters['bias']

    x = np.maximum(conv(p['Conv_0'], np.float64(IMAGES)), 0)
    x = x.reshape(2, 4, 2, 4, 2, 4).mean((2, 4))
    x = np.maximum(conv(p['Conv_1'], x) + p['Conv_1']['context']['shift'], 0)
    expected = x.mean((1, 2)) @ p['Dense_0']['kernel'] + p['Dense_0']['bias']
    np.testing.assert_allclose(inserted.apply(variables, IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_a_submodule_called_twice_has_one_block():
    inserted = insert(Layered(), 'shared', Double())
    variables = Layered().init(KEY, IMAGES)
    model = Layered().bind(variables)
    once = model.layers[1](model.layers[0](IMAGES))
    expected = 2 * model.shared(nn.relu(2 * model.shared(once)))
    np.testing.assert_allclose(
        inserted.apply(variables, IMAGES, method='encode'), expected, rtol=1e-5
    )
    with_parameter = shapes(insert(Layered(), 'shared', Shift()), IMAGES)
    assert places(with_parameter) == ['shared']


@pytest.mark.parametrize(
    'method', ['encode', Layered.encode, Layered().encode, lambda m, x, double: m.encode(x, double)]
)
def test_methods_by_name_and_function(method, random_variables):
    inserted = insert(Layered(), 'layers_*', Shift())
    variables = random_variables(inserted, IMAGES)
    encoded = inserted.apply(variables, IMAGES, double=True, method=method)
    np.testing.assert_array_equal(encoded, 2 * inserted.bind(variables).encode(IMAGES))
    plain = Layered().apply(variables, IMAGES, double=True, method='encode')
    assert np.abs(encoded - plain).max() > 0.1
    # A method that calls no matching submodule is no error: the variables show that there is one.
    assert inserted.apply(variables, encoded, method='classify').shape == (2, 3)
    with pytest.raises(AttributeError, match="Layered with inserted blocks has no method 'layers'"):
        inserted.apply(variables, IMAGES, method=lambda model, x: model.layers[0](x))


def test_a_method_of_any_name_is_forwarded():
    class Named(nn.Module):
        def setup(self):
            self.conv = nn.Conv(3, (1, 1))

        def __call__(self, x):
            return self.conv(x)

        add = predict = zoom = __call__

    inserted = insert(Named(), 'conv', Double())
    variables = inserted.init(KEY, IMAGES)
    expected = 2 * Named().apply(variables, IMAGES)
    for name in ('add', 'predict', 'zoom'):
        np.testing.assert_array_equal(getattr(inserted.bind(variables), name)(IMAGES), expected)
        np.testing.assert_array_equal(inserted.apply(variables, IMAGES, method=name), expected)


def test_gradients_reach_model_and_block(random_variables):
    inserted = insert(ResNet(depth=1), 'block0/bn2', CONTEXT)
    variables = random_variables(inserted, IMAGES, train=False)

    @jax.jit
    def loss(params):
        state = {**variables, 'params': params}
        logits, updates = inserted.apply(state, IMAGES, train=True, mutable=['batch_stats'])
        return (logits**2).sum(), updates

    gradients, updates = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
    for path, gradient in leaves(gradients).items():
        if 'logits/bias' not in path:  # It cancels in the softmax.
            assert np.abs(gradient).max() > 1e-6, path
    old, new = leaves(variables['batch_stats']), leaves(updates['batch_stats'])
    assert old.keys() == new.keys()
    assert all(np.abs(new[path] - old[path]).max() > 0 for path in old)

    kernel = variables['params']['block0']['bn2']['context']['add']['expand']['kernel']
    step = 1e-2

    def moved(amount):
        changed = jax.tree.map(lambda x: x, variables['params'])
        changed['block0']['bn2']['context']['add']['expand']['kernel'] = kernel + amount
        return loss(changed)[0]

    numeric = (moved(step) - moved(-step)) / (2 * step)
    analytic = gradients['block0']['bn2']['context']['add']['expand']['kernel'].sum()
    np.testing.assert_allclose(numeric, analytic, rtol=2e-2)


def test_a_block_with_state_randomness_and_attention():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, features):
            train = self.is_mutable_collection('batch_stats')
            features = nn.BatchNorm(use_running_average=not train, name='norm')(features)
            features = nn.Dropout(0.5, deterministic=not train, name='dropout')(features)
            return GlobalContext(name='gc')(features)

    inserted = insert(CNN(), 'Conv_0', Block())
    variables = inserted.init({'params': KEY, 'dropout': KEY}, IMAGES)
    assert variables['batch_stats']['Conv_0']['context']['norm']['mean'].shape == (4,)

    def run(seed):
        return inserted.apply(
            variables,
            IMAGES,
            train=True,
            mutable=['batch_stats', 'intermediates'],
            rngs={'dropout': jax.random.key(seed)},
        )

    output, state = run(1)
    np.testing.assert_array_equal(output, run(1)[0])
    assert np.abs(output - run(2)[0]).max() > 1e-3
    mean = state['batch_stats']['Conv_0']['context']['norm']['mean']
    assert np.abs(mean).max() > 0
    (attention,) = state['intermediates']['Conv_0']['context']['gc']['pool']['attention']
    np.testing.assert_allclose(attention.sum((1, 2)), 1, rtol=1e-5)


def test_inserts_chain_in_order():
    first = insert(Layered(), 'layers_0', Shift(), name='shift')
    both = insert(first, 'layers_0', Double(), name='double')
    reverse = insert(
        insert(Layered(), 'layers_0', Double(), name='double'), '*_0', Shift(), name='shift'
    )
    variables = first.init(KEY, IMAGES)
    conv = Layered().bind(variables).layers[0](IMAGES)

    def after_first_layer(model):
        _, state = model.apply(
            variables, IMAGES, capture_intermediates=lambda module, _: module.name == 'layers_0'
        )
        return state['intermediates']['layers_0']['__call__'][0]

    np.testing.assert_allclose(after_first_layer(both), (conv + 1) * 2, rtol=1e-5)
    np.testing.assert_allclose(after_first_layer(reverse), conv * 2 + 1, rtol=1e-5)


def test_an_insert_leaves_the_blocks_of_another_alone():
    inserted = insert(insert(CNN(), 'Conv_0', CONTEXT), '**/[Ccl]o*', Shift(), name='shift')
    assert places(shapes(inserted, IMAGES), 'shift') == ['Conv_0', 'Conv_1']
    # A block can itself be a model with a block.
    inner = insert(nn.Sequential([nn.Conv(4, (1, 1)), nn.relu]), 'layers_0', Shift(), name='inner')
    assert places(shapes(insert(CNN(), 'Conv_*', inner), IMAGES), 'inner') == [
        'Conv_0/context/layers_0',
        'Conv_1/context/layers_0',
    ]


@pytest.mark.parametrize(
    ('pattern', 'expected'),
    [
        ('stem', ['stem']),
        ('block?/conv1', ['block0/conv1', 'block1/conv1']),
        ('block[1]/*2', ['block1/bn2', 'block1/conv2']),
        ('*/conv1', ['block0/conv1', 'block1/conv1']),
        ('**/conv1', ['block0/conv1', 'block1/conv1']),
        ('**/block0/**/bn1', ['block0/bn1']),
        ('block0/**', ['block0', 'block0/bn1', 'block0/bn2', 'block0/conv1', 'block0/conv2']),
    ],
)
def test_patterns(pattern, expected):
    inserted = insert(ResNet(), pattern, Shift())
    assert places(shapes(inserted, IMAGES, train=False)) == expected


def test_a_model_within_a_model():
    class Parent(nn.Module):
        where: str

        def setup(self):
            if self.where == 'setup':
                self.backbone = insert(CNN(), 'Conv_*', CONTEXT)

        @nn.compact
        def __call__(self, x):
            if self.where == 'setup':
                return self.backbone(x)
            return insert(CNN(name='backbone'), 'Conv_*', CONTEXT)(x)

    for where in ('setup', 'compact'):
        assert places(shapes(Parent(where), IMAGES)) == ['backbone/Conv_0', 'backbone/Conv_1']
    outer = insert(Parent('setup'), 'backbone/Conv_0', Shift(), name='outer')
    variables = shapes(outer, IMAGES)
    assert places(variables, 'outer') == ['backbone/Conv_0']


def test_modules_that_a_model_only_borrows_have_no_block():
    class Side(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (1, 1), name='conv')(x)

    class Borrower(nn.Module):
        before: nn.Module
        after: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.after(nn.Conv(3, (1, 1), name='conv')(self.before(x)))

    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            model = Borrower(Side(name='a_side'), Side(name='z_side'), name='model')
            return insert(model, 'conv', Shift())(x)

    variables = shapes(Parent(), IMAGES)
    assert variables['params'].keys() == {'a_side', 'model', 'z_side'}
    assert places(variables) == ['model/conv']


def test_remat_gives_the_same_variables_and_outputs(random_variables):
    plain = insert(ResNet(depth=1), 'block*', CONTEXT)
    lifted = insert(ResNet(nn.remat(Bottleneck), depth=1), 'block*', CONTEXT)
    variables = random_variables(plain, IMAGES, train=False)
    lifted_shapes = shapes(lifted, IMAGES, train=False)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, lifted_shapes)

    def gradients(model):
        def loss(variables):
            return model.apply(variables, IMAGES, train=True, mutable=['batch_stats'])[0].sum()

        return jax.jit(jax.grad(loss))(variables)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
        gradients(plain),
        gradients(lifted),
    )


class Body(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Conv(3, (1, 1), name='conv')(carry), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(Body, variable_axes={'params': 0}, split_rngs={'params': True}, length=2)
        return body(name='body')(x, None)[0]


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x):
        member = nn.vmap(
            nn.Conv, in_axes=None, variable_axes={'params': 0}, split_rngs={'params': True},
            axis_size=2,
        )  # fmt: skip
        return member(3, (1, 1), name='member')(x)


def test_scan_has_a_block_for_each_step(random_variables):
    inserted = insert(Scanned(), 'body/conv', Shift())
    variables = random_variables(inserted, IMAGES)
    p = variables['params']['body']['conv']
    assert p['context']['shift'].shape == (2,)
    x = np.float64(IMAGES)
    for step in range(2):
        x = x @ p['kernel'][step][0, 0] + p['bias'][step] + p['context']['shift'][step]
    np.testing.assert_allclose(inserted.apply(variables, IMAGES), x, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"output of 'body' must be .* got tuple"):
        shapes(insert(Scanned(), 'body', Shift()), IMAGES)


def test_vmap_has_a_block_for_each_member(random_variables):
    inserted = insert(Ensemble(), 'member', CONTEXT)
    variables = random_variables(inserted, IMAGES)
    output = inserted.apply(variables, IMAGES)
    for index in range(2):
        p = jax.tree.map(lambda x, index=index: x[index], variables['params']['member'])
        conv = IMAGES @ p['kernel'][0, 0] + p['bias']
        expected = CONTEXT.apply({'params': p['context']}, conv)
        np.testing.assert_allclose(output[index], expected, rtol=1e-4, atol=1e-5)


def test_traces_kept_by_flax_jit_are_not_confused():
    class Compiled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name='inner')(x)

    @nn.jit
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (1, 1), name='conv')(x)

    variables = Compiled().init(KEY, IMAGES)
    plain = Compiled().apply(variables, IMAGES)
    inserted = insert(Compiled(), 'inner/conv', Double())
    for _ in range(2):
        np.testing.assert_array_equal(inserted.apply(variables, IMAGES), 2 * plain)
    np.testing.assert_array_equal(Compiled().apply(variables, IMAGES), plain)
    for _ in range(2):
        name = ''.join(['con', 'text'])  # Equal to the one before, but not the same object.
        inserted = insert(Compiled(), '*/conv', Shift(), name=name)
        assert places(inserted.init(KEY, IMAGES)) == ['inner/conv']


def test_super_call_has_one_block():
    class Scaled(nn.Conv):
        def __call__(self, x):
            return super().__call__(x) * 3

    model = nn.Sequential([Scaled(3, (1, 1))])
    variables = model.init(KEY, IMAGES)
    output = insert(model, 'layers_0', Shift()).init_with_output(KEY, IMAGES)[0]
    np.testing.assert_allclose(output, model.apply(variables, IMAGES) + 1, rtol=1e-5)


def test_tabulate_shows_the_blocks():
    table = insert(CNN(), 'Conv_*', Shift()).tabulate(KEY, IMAGES, console_kwargs={'width': 200})
    assert 'Conv_1/context' in table
    assert table.count('CNN') == 1


def test_a_pattern_that_matches_nothing_lists_the_paths():
    expected = "no submodule .* matches 'conv9'; there are: stem, block0, block0/conv1, block0/bn1"
    inserted = insert(ResNet(), 'conv9', CONTEXT)
    with pytest.raises(ConfigError, match=expected):
        inserted.init(KEY, IMAGES, train=False)
    with pytest.raises(ConfigError, match=expected):
        shapes(inserted, IMAGES, train=False)
    variables = ResNet().init(KEY, IMAGES, train=False)
    with pytest.raises(ConfigError, match=expected):
        inserted.apply(variables, IMAGES, train=False)
    long = nn.Sequential([nn.Dropout(0.5, deterministic=True) for _ in range(60)])
    with pytest.raises(ConfigError, match=r'layers_49, \.\.\. \(60 in all\)'):
        shapes(insert(long, 'conv', CONTEXT), IMAGES)


def test_only_call_counts():
    class Encoding(nn.Module):
        def setup(self):
            self.inner = Layered()

        def __call__(self, x):
            return self.inner.encode(x)

    with pytest.raises(ConfigError, match='there are: inner/layers_0, inner/layers_1'):
        shapes(insert(Encoding(), 'inner', CONTEXT), IMAGES)


def test_names_that_are_taken():
    twice = insert(insert(CNN(), 'Conv_0', CONTEXT), 'Conv_0', CONTEXT)
    with pytest.raises(ConfigError, match=r"'Conv_0' already has 'context'.*another name"):
        shapes(twice, IMAGES)
    with pytest.raises(ConfigError, match="'Conv_0' already has 'kernel'"):
        shapes(insert(CNN(), 'Conv_0', CONTEXT, name='kernel'), IMAGES)
    with pytest.raises(ConfigError, match="'block0' already has 'conv1'"):
        shapes(insert(ResNet(), 'block0', CONTEXT, name='conv1'), IMAGES, train=False)


def test_outputs_that_no_block_takes():
    with pytest.raises(TypeError, match=r"output of 'Dense_0' must be .* got float32\[2, 3\]"):
        shapes(insert(CNN(), 'Dense_0', CONTEXT), IMAGES)

    class Integer(nn.Module):
        def __call__(self, x):
            return x.astype(jnp.int32)

    with pytest.raises(TypeError, match=r"output of 'layers_0' must be .* got int32\[2, 8, 8, 3\]"):
        shapes(insert(nn.Sequential([Integer()]), 'layers_0', CONTEXT), IMAGES)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ((CNN, '*', CONTEXT), TypeError, 'model must be an instance .* got the class CNN'),
        ((CNN(), '*', GlobalContext), TypeError, 'block must be an instance .* got the class'),
        ((CNN(), '', CONTEXT), ConfigError, "pattern must be .* got ''"),
        ((CNN(), '/Conv_0', CONTEXT), ConfigError, "got '/Conv_0'"),
        ((CNN(), ['a', 'b'], CONTEXT), ConfigError, 'pattern must be'),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        insert(*arguments)


@pytest.mark.parametrize('name', ['', 'a/b', None])
def test_bad_names(name):
    with pytest.raises(ConfigError, match='name must be a word'):
        insert(CNN(), '*', CONTEXT, name=name)


def test_a_name_is_given_by_keyword():
    with pytest.raises(TypeError, match='positional'):
        insert(CNN(), '*', CONTEXT, 'context')
    inserted = insert(model=CNN(), pattern='*', block=CONTEXT)
    assert inserted == insert(CNN(), '*', CONTEXT)


def test_an_unbound_call_is_an_error():
    with pytest.raises(Exception, match="Can't call compact methods on unbound modules"):
        insert(Layered(), '*', CONTEXT)(IMAGES)


def test_the_same_insert_is_equal_and_hashes_alike():
    first, second = (insert(CNN(), 'Conv_*', GlobalContext()) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != insert(CNN(), 'Conv_1', GlobalContext())
