import copy
from pathlib import Path

import oracle
import pytest
import torch

from agglomerator import Agglomerator
from agglomerator.config import Settings
from agglomerator.model.agglomerator import State
from agglomerator.model.attention import ConsensusAttention
from agglomerator.model.columns import ColumnNet
from agglomerator.training.losses.contrastive import supervised_contrastive_loss
from agglomerator.util.errors import UserError

REFERENCES = sorted((Path(__file__).parents[1] / "reference").glob("*.pt"))

# Levels, iterations, patches, radius, state that feeds the head and the three grids, in mixture.
CONFIGURATIONS = {
    "two levels": dict(),
    "three levels, even patch": dict(levels=3, patch_size=2, patch_dim=8),
    "four columns": dict(patch_size=2, patch_dim=8, levels=4),
    "five levels, more iterations": dict(levels=5, iters=11),
    "fewer iterations than levels": dict(levels=5, iters=3, denoise_iter=2),
    "initial state": dict(levels=3, denoise_iter=0),
    "no iteration": dict(iters=0),
    "first state, from the end": dict(levels=2, iters=2, denoise_iter=-3),
    "state before the last": dict(levels=3, denoise_iter=-2),
    "one iteration": dict(levels=3, denoise_iter=1),
    "radius": dict(local_consensus_radius=1),
    "radius, self": dict(levels=3, local_consensus_radius=2, consensus_self=True),
    "radius, many tiles": dict(image_size=24, conv_image_size=12, iters=2,
                               local_consensus_radius=2),
    "radius, tiles that do not fit": dict(image_size=20, conv_image_size=5,
                                          local_consensus_radius=1),
    "radius beyond the grid": dict(local_consensus_radius=7),
    "radius far beyond the grid": dict(local_consensus_radius=1e9),
    "radius of the eight neighbours": dict(local_consensus_radius=1.5),
    "radius of a distance": dict(local_consensus_radius=13**0.5, image_size=24, conv_image_size=6),
    "radius of nobody": dict(local_consensus_radius=0.5),
    "fraction, many tiles": dict(image_size=24, conv_image_size=12, iters=2,
                                 local_consensus_radius=2.9),
    "temperature": dict(consensus_temperature=0.2),
    "temperature, radius": dict(consensus_temperature=0.2, levels=3, local_consensus_radius=1),
    "self": dict(consensus_self=True, levels=4, iters=5),
    "half grid, gray": dict(image_size=12, conv_image_size=6, n_channels=1, patch_size=2,
                            patch_dim=8, local_consensus_radius=1),
    "full grid": dict(image_size=8, conv_image_size=8, levels=3),
    "full grid, patches": dict(image_size=8, conv_image_size=8, patch_size=4, patch_dim=32),
    "wide and deep tokenizer": dict(tokenizer_width=5, tokenizer_depth=4),
    "residual tokenizer": dict(tokenizer="residual", tokenizer_width=5, tokenizer_depth=2),
    "residual tokenizer, full grid": dict(tokenizer="residual", image_size=8, conv_image_size=8),
    "vgg tokenizer": dict(tokenizer="vgg", tokenizer_width=5, tokenizer_depth=2),
    "vgg tokenizer, rounded up": dict(tokenizer="vgg", image_size=13, conv_image_size=4),
    "vgg tokenizer, half grid": dict(tokenizer="vgg", image_size=8, conv_image_size=4),
    "grid head": dict(head="grid", image_size=24, conv_image_size=6),
    "coarse grid head": dict(head="grid", head_side=3, image_size=24, conv_image_size=6),
    "grid head on fewer columns": dict(head="grid", patch_size=2, patch_dim=8),
    "agreement": dict(consensus="agreement", iters=2),
    "agreement, repelled": dict(consensus="agreement_repel", iters=1, denoise_iter=0, levels=3,
                                image_size=20, conv_image_size=5),
    "dissimilarity head": dict(head="dissimilarity", image_size=32, conv_image_size=8),
    "mean head": dict(head="mean", image_size=20, conv_image_size=5),
    "recomputed": dict(levels=3, recompute=True),
    "rounded up": dict(image_size=13, conv_image_size=4),
    "rounded up, half": dict(image_size=11, conv_image_size=6, patch_size=3, patch_dim=36),
}  # fmt: skip
SMALL = dict(image_size=16, conv_image_size=4, patch_dim=6, contr_dim=5, n_classes=3, dropout=0.0)


def random_model(**flags):
    """A model in float64 in which no weight has the value that it would start with."""
    torch.manual_seed(1)
    model = Agglomerator(**flags).double()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor) * (not name.endswith("sign"))
            if name in model.mixing_names:
                tensor.add_(torch.rand_like(tensor))
    return model


def leaves(state_dict):
    """A state dict in float64, every parameter a leaf that collects a gradient."""
    return {
        name: tensor.detach().double().clone().requires_grad_("running" not in name)
        for name, tensor in state_dict.items()
        if tensor.is_floating_point()
    }


def gradients_of(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def distance(found, expected):
    """How far off, relative to the scale of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("flags", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_every_configuration_computes_the_equations(flags):
    flags = SMALL | flags
    model = random_model(**flags)
    settings = vars(model.settings)
    weights = leaves(model.state_dict())
    channels, side = settings["n_channels"], settings["image_size"]
    images = torch.randn(6, channels, side, side, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2]).repeat(2)

    model.eval()
    expected = oracle.states(weights, settings, images)
    torch.testing.assert_close(model.states(images), expected)
    embedded = oracle.embedding(weights, expected, settings)
    torch.testing.assert_close(model(images), embedded)
    torch.testing.assert_close(model.with_levels(images), (embedded, expected[-1]))
    torch.testing.assert_close(model.classify(images), oracle.logits(weights, embedded))

    model.train()
    statistics = {}
    expected = oracle.states(weights, settings, images, train=True, statistics=statistics)
    embedded = oracle.embedding(weights, expected, settings)
    loss = oracle.contrastive_loss(embedded, labels, 0.2)
    (loss + oracle.logits(weights, embedded).square().sum()).backward()

    found = model(images)
    torch.testing.assert_close(found, embedded)
    found_loss = supervised_contrastive_loss(found, labels, 0.2)
    torch.testing.assert_close(found_loss, loss)
    logits = model.classification_head_from_contr(found)
    (found_loss + logits.square().sum()).backward()
    found = model.state_dict()
    for name, expected in statistics.items():
        torch.testing.assert_close(found[name], expected)
    scale = torch.cat([w.grad.flatten() for w in weights.values() if w.grad is not None]).norm()
    for name, gradient in gradients_of(model).items():
        expected = weights[name].grad
        expected = torch.zeros_like(gradient) if expected is None else expected
        assert (gradient - expected).norm() < 1e-5 * scale, name


def assert_equal_with_gradients(module, fast, plain, *inputs):
    """Two functions of tensors agree in value, and in the gradients of inputs and weights."""
    found, expected = fast(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    learning = [*inputs, *module.parameters()]
    gradients = [
        torch.autograd.grad((value * weights).sum(), learning, materialize_grads=True)
        for value in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def random_input(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reverse, places", [(False, True), (True, True), (False, False)])
def test_fast_column_net_is_the_plain_one(reverse, places):
    torch.manual_seed(0)
    net = ColumnNet(3, 6, 16, torch.nn.GELU(), reverse, places).double()
    for parameter in net.parameters():
        parameter.data += torch.randn_like(parameter)

    def fast(x, scale):
        scaled = net.scaled(scale)
        return torch.cat([scaled(x[:2], 0), scaled(x[2:], 2)])

    def plain(x, scale):
        return scale * torch.stack([net.plain(x[level], level) for level in range(3)])

    assert_equal_with_gradients(
        net, fast, plain, random_input(3, 6, 2, 16), random_input(3, 1, 1, 1)
    )


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("consensus_self", [False, True])
@pytest.mark.parametrize("grid_size, radius", [(4, 0), (5, 1), (5, 1.5), (12, 2.9), (4, 7)])
def test_fast_consensus_is_the_plain_one(grid_size, radius, consensus_self, temperature):
    torch.manual_seed(0)
    attention = ConsensusAttention(grid_size, consensus_self, radius, temperature).double()
    level = random_input(6, 2, grid_size**2)
    assert_equal_with_gradients(attention, attention, attention.plain, level)


@pytest.mark.parametrize("alike", [False, True])
def test_fast_iteration_is_the_plain_one(alike):
    model = random_model(**SMALL, levels=3)
    columns = 1 if alike else 16

    def fast(state, tokens):
        state = State([(0, state.expand(-1, -1, -1, 16))], 0 if alike else 3)
        return model.iterate(state, model.prepare(tokens), 3, alike).whole(2)

    def plain(state, tokens):
        levels = list(state.expand(-1, -1, 2, 16))
        return torch.stack(model.plain_iteration(levels, tokens)).permute(2, 3, 0, 1)

    images = 1 if alike else 2
    state, tokens = random_input(3, 6, images, columns), random_input(6, 2, 16)
    assert_equal_with_gradients(model, fast, plain, state, tokens)


@pytest.mark.parametrize("flags", [dict(levels=5, iters=7), dict(levels=3, denoise_iter=2)])
def test_levels_that_are_left_out_do_not_change_the_embedding(flags):
    model = random_model(**SMALL | flags)
    images = random_input(6, 3, 16, 16)
    assert_equal_with_gradients(model, model, lambda x: model.with_levels(x)[0], images)


@pytest.fixture(scope="module", params=REFERENCES, ids=lambda path: path.stem)
def reference(request):
    case = torch.load(request.param, weights_only=True)
    model = Agglomerator(**case["flags"])
    model.load_state_dict(case["state_dict"])
    return case, model


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_reference_in_evaluation(reference):
    case, model = reference
    model.eval()
    with torch.no_grad():
        found = model.states(case["images"])
        assert found.shape == case["states"].shape
        for state, expected in zip(found, case["states"], strict=True):
            close(state, expected)
        close(model(case["images"]), case["embedding"])
        close(model.classify(case["images"]), case["logits"])


def test_reference_in_training(reference):
    case, model = reference
    model.load_state_dict(case["state_dict"])
    model.zero_grad()
    model.train()
    embedded = model(case["images"])
    close(embedded, case["train_embedding"])
    labels = case["labels"].repeat(2)
    loss = supervised_contrastive_loss(embedded, labels, case["flags"]["temperature"])
    close(loss, case["loss"])
    loss.backward()
    found = model.state_dict()
    for name, expected in case["batchnorm_after"].items():
        close(found[name], expected)

    # The reference's gradients carry the rounding noise of float32, the smallest relatively most.
    gradients = gradients_of(model)
    names = sorted(case["grads"].keys() - {"init_levels"})
    everything = [torch.cat([g[n].flatten() for n in names]) for g in (gradients, case["grads"])]
    scale = everything[1].norm()
    assert distance(*everything) < 1e-4
    for name in names:
        found, expected = gradients[name], case["grads"][name]
        assert (found - expected).norm() < 1e-3 * expected.norm() + 1e-5 * scale, name

    # That of init_levels is noise for the most part: the LayerNorm of equal columns passes no
    # gradient on, but multiplies rounding noise by 1 / sqrt(eps). So it is taken in float64.
    weights = leaves(case["state_dict"])
    states = oracle.states(weights, case["flags"], case["images"].double(), train=True)
    embedded = oracle.embedding(weights, states, case["flags"])
    oracle.contrastive_loss(embedded, labels, case["flags"]["temperature"]).backward()
    assert (gradients["init_levels"] - weights["init_levels"].grad).norm() < 1e-4 * scale


def test_state_dict_has_the_published_names_and_shapes(reference):
    case, model = reference
    published = {name: value.shape for name, value in case["state_dict"].items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == published


def test_states_go_on_from_a_state():
    model = Agglomerator(**SMALL, levels=3).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        whole = model.states(images, iters=5)
        rest = model.states(images, iters=3, levels=whole[2])
    assert whole.shape == (6, 2, 16, 3, 6)
    torch.testing.assert_close(rest, whole[2:])


def test_initial_state_is_init_levels_in_every_column():
    model = Agglomerator(**SMALL)
    (state,) = model.states(torch.randn(2, 3, 16, 16), iters=0)
    assert (state == model.init_levels).all()


@pytest.mark.parametrize("kind", ["convmlp", "residual", "vgg", "pyramid"])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_convolutions_see_channels_last(kind, n_channels):
    """Convolutions and pooling are half as fast again in this layout on a CPU."""
    model = Agglomerator(**SMALL, tokenizer=kind, n_channels=n_channels)
    layouts = []
    for module in model.image_to_tokens.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.MaxPool2d):
            module.register_forward_hook(lambda module, seen, out: layouts.append(out.stride(1)))
    model(torch.randn(2, n_channels, 16, 16))
    assert layouts and set(layouts) == {1}


@pytest.mark.parametrize(
    "flags", [{}, {"local_consensus_radius": 1}, {"consensus_temperature": 0.05}], ids=str
)
@pytest.mark.parametrize("side", [4, 7])
def test_a_fresh_network_has_no_rounding_noise_to_magnify(flags, side):
    """Its columns start equal; levels that have not heard of the image yet remain so, and norms
    over columns would make signals of their rounding errors."""
    torch.manual_seed(0)
    flags = flags | {"levels": 5, "head": "grid", "image_size": 4 * side, "conv_image_size": side}
    model = Agglomerator(**SMALL | flags)
    exact = copy.deepcopy(model).double()
    images = torch.randn(6, 3, 4 * side, 4 * side)
    labels = torch.tensor([0, 1, 2]).repeat(2)

    embedded, expected = model(images), exact(images.double())
    assert distance(embedded, expected) < 1e-4
    supervised_contrastive_loss(embedded, labels).backward()
    supervised_contrastive_loss(expected, labels).backward()
    found, wanted = (
        torch.cat([g.flatten() for g in gradients_of(m).values()]).double() for m in (model, exact)
    )
    assert distance(found, wanted) < 1e-3

    with torch.autocast("cpu", torch.bfloat16):
        states = model.states(images)
        assert distance(model(images), expected) < 0.2
    assert states.dtype == torch.float32
    for level in range(5):
        for state in states[: level + 1, :, :, level]:
            torch.testing.assert_close(state, state[:, :1].expand_as(state), rtol=0, atol=1e-6)


def test_dropout_acts_in_training_alone():
    model = Agglomerator(**SMALL | {"dropout": 0.5})
    images = torch.randn(4, 3, 16, 16)
    assert not torch.equal(model(images), model(images))
    model.eval()
    torch.testing.assert_close(model(images), model(images))


def test_output_shapes_of_the_defaults():
    model = Agglomerator(patch_dim=8).eval()
    images = torch.randn(2, 3, 32, 32)
    embedding = model(images)
    assert embedding.shape == (2, 512)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    assert model.classify(images).shape == (2, 10)


def test_published_cifar10_model_has_its_number_of_parameters():
    with torch.device("meta"):
        model = Agglomerator()
    assert model.settings == Settings()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 72.14


def test_weights_of_the_grid_head_do_not_grow_with_the_columns():
    def size(**flags):
        with torch.device("meta"):
            head = Agglomerator(patch_dim=8, head="grid", **flags).contrastive_head
        return sum(p.numel() for p in head.parameters())

    assert size() == size(conv_image_size=32)


def test_settings_that_make_no_network_are_refused():
    with pytest.raises(UserError, match="--patch_size=3"):
        Agglomerator(patch_size=3)
    with pytest.raises(TypeError, match="patchsize"):
        Agglomerator(patchsize=1)


@pytest.mark.parametrize("call", ["__call__", "with_levels"])
def test_recomputing_keeps_less_for_the_backward_pass(call):
    kept = {}
    for recompute in (False, True):
        model = Agglomerator(**SMALL, iters=6, recompute=recompute)
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            getattr(model, call)(torch.randn(4, 3, 16, 16))
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_a_state_beyond_the_iterations_is_refused():
    model = Agglomerator(patch_dim=8, contr_dim=8, image_size=16, conv_image_size=4, denoise_iter=4)
    images = torch.randn(2, 3, 16, 16)
    for call in (model, model.with_levels):
        with pytest.raises(UserError, match=r"iters=3: makes the states 0 to 3, .* state 4"):
            call(images, iters=3)
    torch.testing.assert_close(model.eval()(images, iters=6), model(images))
