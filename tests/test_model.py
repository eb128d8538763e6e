"""The network against transformers' own, and the student's sharing with its teacher."""

import pytest
import torch
import transformers
from conftest import ROOT, TEACHER, random_model, tiny_config

import kernel_cpu
import model as model_file
import precision
from engine import step
from hub import checkpoint
from hub.checkpoint import set_parameter
from hub.tokenizer import load_tokenizer
from model import (
    TRAINED,
    Block,
    Llama,
    LlamaConfig,
    make_student,
    move_pairs,
    next_token_loss,
    trainable,
)
from precision import attention_dtype, choose_dtype
from rope import frequencies, pairs_by_slot, rotate, rotation

IDS = torch.randint(0, 4096, (2, 50), generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "as many key heads as query heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "a head_dim of its own": {"head_dim": 16},
    "linear x8": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0}},
    "yarn x4": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "dynamic, beyond its length": {
        "max_position_embeddings": 20,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    },
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral with a window of 20": {"model_type": "mistral", "sliding_window": 20},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3"},
}


def transformers_model(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, **options
    ).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_those_of_transformers_reading_our_export(name, tmp_path):
    """float32 rounding: no more than 1e-4 of the logits' spread, at positions inside and beyond the
    native window.
    """
    model = random_model(**NETWORKS[name])
    checkpoint.save_pretrained(model, tmp_path / "x")
    theirs = transformers_model(tmp_path / "x", attn_implementation="eager")
    with torch.no_grad():
        ours, expected = model(IDS), theirs(IDS).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_directory_written_by_transformers_loads(name, tmp_path):
    changes = NETWORKS[name]
    config = tiny_config(**changes)
    family = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(family).eval()
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert (ours(IDS) - expected).abs().max() <= 1e-4 * expected.std()


def test_the_student_shares_every_frozen_tensor():
    teacher = random_model()
    student = make_student(teacher, teacher.config.extended("linear", 8))
    theirs = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        if any(part in name for part in TRAINED):
            assert (
                p.requires_grad
                and p.dtype == torch.float32
                and p.data_ptr() != theirs[name].data_ptr()
            )
            assert torch.equal(p, theirs[name].float())
        else:
            assert p is theirs[name] and not p.requires_grad
    assert student.lm_head.weight is teacher.model.embed_tokens.weight


def moved_student(teacher: Llama, scale: float) -> tuple[Llama, list[int]]:
    """(a linear student with moved pairs, which pair each slot has)."""
    student = make_student(teacher, teacher.config.extended("linear", scale)).to(teacher.dtype)
    pairs = pairs_by_slot(teacher.config.rope, student.config.rope)
    move_pairs(student, pairs)
    return student, pairs


def queries_and_keys(model: Llama, cos_sin) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of the first layer over IDS, keys repeated for the queries that share them."""
    layer = model.model.layers[0]
    q, k, _ = layer.self_attn.qkv(layer.input_layernorm(model.embed(IDS)), cos_sin)
    return q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)


@pytest.mark.parametrize("head_dim", [8, 10, 64])
def test_moving_pairs_changes_no_score_without_positions(head_dim):
    """q and k are the teacher's numbers in another order; sums of whole numbers then to the bit."""
    shape = {"head_dim": head_dim, "attention_bias": True, "max_position_embeddings": 512}
    teacher = random_model(**shape)
    student, pairs = moved_student(teacher, 8)
    assert pairs != sorted(pairs)
    still = torch.ones(50, head_dim), torch.zeros(50, head_dim)
    (q, k), (ours_q, ours_k) = (queries_and_keys(m, still) for m in (teacher, student))
    rows = pairs + [pair + head_dim // 2 for pair in pairs]
    assert torch.equal(ours_q, q[..., rows]) and torch.equal(ours_k, k[..., rows])
    q, k, ours_q, ours_k = ((1000 * x).round().double() for x in (q, k, ours_q, ours_k))
    for x, y, ours_x, ours_y in ((q, k, ours_q, ours_k), (q, q, ours_q, ours_q)):
        assert torch.equal(ours_x @ ours_y.mT, x @ y.mT)


@pytest.mark.parametrize("scale, shift", [(2, 1), (8, 3), (64, 6)])
def test_a_moved_pair_adds_to_a_score_what_it_did_in_the_teacher(scale, shift):
    """Neighbouring frequencies in the ratio 2, so that the shift is whole: D/2 = 12, theta = 2^12."""
    shape = {"head_dim": 24, "rope_theta": 2.0**12, "max_position_embeddings": 65536}
    shape |= {"model_type": "qwen2"}
    teacher = random_model(**shape).double()
    student, pairs = moved_student(teacher, scale)
    yarn = teacher.config.rope.scaled("yarn", scale)
    w, theirs = (frequencies(rope, 24)[0] for rope in (teacher.config.rope, yarn))
    moved = [slot for slot, pair in enumerate(pairs) if pair == slot + shift]
    moved = [slot for slot in moved if theirs[pairs[slot]] == w[pairs[slot]]]  # yarn leaves it
    assert len(moved) >= 2

    def scores(model, slots):
        q, k = queries_and_keys(model, model.cos_sin(50, model.embed(IDS)))
        rows = [*slots, *(slot + 12 for slot in slots)]
        return q[..., rows] @ k[..., rows].mT  # [B, H, 50, 50] at all positions m, n

    expected = scores(teacher, [pairs[slot] for slot in moved])
    assert (scores(student, moved) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (scores(student, range(12)) - scores(teacher, range(12))).abs().max() > 0.1


def test_moving_pairs_lowers_the_loss_of_an_untrained_student():
    """Over a page of Python, which the demo's teacher learned: 5.71 nats, and 5.43 moved."""
    teacher = Llama.from_pretrained(TEACHER, dtype=torch.float32)
    text = (ROOT / "hub" / "checkpoint.py").read_text()
    ids = torch.tensor(load_tokenizer(TEACHER).encode(text)[: 4 * 256]).view(4, 256)
    losses = []
    for moved in (False, True):
        student = make_student(teacher, teacher.config.extended("linear", 8))
        student = moved_student(teacher, 8)[0] if moved else student
        with torch.no_grad():
            losses.append(next_token_loss(student, student.hidden(ids[:, :-1]), ids[:, 1:]).item())
    assert losses[1] < losses[0] - 0.1


def test_walking_gives_what_each_layer_does_and_only_when_asked():
    model = random_model()
    h, cos_sin = model.embed(IDS), model.cos_sin(50, model.embed(IDS))
    calls = []
    for l, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, l=l: calls.append(l))
    walk = model.walk(IDS)
    assert not calls
    for l, (layer, (ours, qkv)) in enumerate(zip(model.model.layers, walk, strict=True)):
        assert calls == list(range(l + 1))
        h, expected = Block.forward(layer, h, cos_sin)
        assert torch.equal(ours, h) and [x.shape[1] for x in qkv] == [4, 2, 2]
        assert all(torch.equal(x, y) for x, y in zip(qkv, expected, strict=True))
    assert torch.equal(model.hidden(IDS), model.model.norm(h))


def test_a_parameter_is_put_in_place_shared_and_with_the_head_that_is_tied_to_it():
    model, name = random_model(), "model.embed_tokens.weight"
    shared = torch.nn.Parameter(torch.zeros(4096, 32))
    set_parameter(model, name, shared)
    assert model.model.embed_tokens.weight is shared and model.lm_head.weight is shared
    set_parameter(model, name, torch.ones(4096, 32))
    assert not model.lm_head.weight.requires_grad and model.lm_head.weight[0, 0] == 1
    untied = random_model(tie_word_embeddings=False)
    set_parameter(untied, name, shared)
    assert untied.lm_head.weight is not shared


def test_the_head_dimension_has_one_source():
    config = LlamaConfig.from_hf(tiny_config(head_dim=None))
    assert config.head_dim == config.rope.head_dim == 8
    assert LlamaConfig.from_hf(tiny_config(head_dim=16)).extended("ntk", 8).head_dim == 16


def test_chunked_loss_and_gradient_equal_the_plain_ones():
    model = random_model().double()
    h = torch.randn(2, 50, 32, dtype=torch.float64, requires_grad=True)
    plain = torch.nn.functional.cross_entropy(model.lm_head(h).flatten(0, 1), IDS.flatten())
    (expected,) = torch.autograd.grad(plain, h)
    for chunk in (7, 100, 1000):
        loss = next_token_loss(model, h, IDS, chunk)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(torch.autograd.grad(loss, h)[0], expected, rtol=1e-4, atol=1e-8)
    assert next_token_loss(model, h, IDS, reduction="none").shape == IDS.shape


@pytest.mark.parametrize("layers", [1, 2])
def test_recomputing_changes_nothing_but_memory(layers):
    teacher = random_model()
    student = make_student(teacher, teacher.config.extended("linear", 8))

    def gradients(recomputed: int):
        loss, parts, _ = step.relation_loss(
            teacher, student, IDS, torch.float32, recomputed=recomputed
        )
        loss.backward()
        out = [p.grad.clone() for p in trainable(student).values()]
        for p in trainable(student).values():
            p.grad = None
        return [loss.detach(), parts, *out]

    for a, b in zip(gradients(0), gradients(layers), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_each_losss_forward_runs_once(recomputed, monkeypatch):
    """A checkpointed layer's second run takes its numbers from the first; a second backward through
    the same graph is possible too.
    """
    teacher = random_model()
    student = make_student(teacher, teacher.config.extended("linear", 8))
    forward, calls = kernel_cpu._forward, []
    monkeypatch.setattr(kernel_cpu, "_forward", lambda *a, **k: calls.append(a) or forward(*a, **k))
    more = {"impl": "tiled", "recomputed": recomputed}
    loss, _, _ = step.relation_loss(teacher, student, IDS, torch.float32, **more)
    weights = list(trainable(student).values())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, weights)))
    assert len(calls) == 3 * teacher.config.n_layer


def test_relation_loss_is_the_mean_of_the_dense_definition_over_layers_and_heads():
    teacher = random_model()
    student = make_student(teacher, teacher.config.extended("linear", 8))
    _, parts, _ = step.relation_loss(teacher, student, IDS, torch.float32, impl="tiled")
    _, dense, _ = step.relation_loss(teacher, student, IDS, torch.float32, impl="dense")
    torch.testing.assert_close(parts, dense)
    loss, _, _ = step.relation_loss(teacher, student, IDS, torch.float32, authors_heads=True)
    weights = torch.tensor([1.0, 0.5, 0.5])  # Hkv / H = 2 / 4
    torch.testing.assert_close(loss.detach(), (parts * weights).sum(-1).mean())


def test_unscaled_student_has_no_relation_loss():
    teacher = random_model()
    same = make_student(teacher, teacher.config)
    loss, _, _ = step.relation_loss(teacher, same, IDS, torch.float32)
    assert loss.item() == 0


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_refusals_name_the_key_and_value(change, said):
    with pytest.raises(ValueError, match=said):
        LlamaConfig.from_hf(tiny_config(**change))


def test_the_logit_term_is_the_plain_kl_and_none_without_scaling():
    teacher = random_model()
    student = make_student(teacher, teacher.config.extended("linear", 8))
    alone, _, _ = step.relation_loss(teacher, student, IDS, torch.float32)
    both, _, _ = step.relation_loss(teacher, student, IDS, torch.float32, logit_weight=0.5)
    p, q = student(IDS).log_softmax(-1), teacher(IDS).log_softmax(-1)
    torch.testing.assert_close(both - alone, 0.5 * (q.exp() * (q - p)).sum(-1).mean())
    same = make_student(teacher, teacher.config)
    assert step.relation_loss(teacher, same, IDS, torch.float32, logit_weight=1.0)[0].abs() < 1e-6


def test_relations_are_blind_to_a_rotation_of_all_keys_and_logits_are_not():
    """The reason for the logit term: turn the value projection of every head by one rotation."""
    teacher = random_model()
    student = make_student(teacher, teacher.config)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    v = student.model.layers[1].self_attn.v_proj.weight
    v.data = (turn @ v.data.view(2, 8, 32)).view(16, 32)
    relations, _, _ = step.relation_loss(teacher, student, IDS, torch.float32)
    both, _, _ = step.relation_loss(teacher, student, IDS, torch.float32, logit_weight=1.0)
    assert relations.abs() < 1e-5 and both > 0.1


def test_the_next_token_kl_sees_the_turn_that_no_relation_sees():
    """train.py's docstring: all keys of the last layer turned as if one token further on."""
    teacher = random_model()
    student = make_student(teacher, teacher.config, trained=("k_proj",))
    keys = student.model.layers[-1].self_attn.k_proj.weight  # [Hkv D, C]
    straight = keys.detach().clone()
    cos, sin = rotation(teacher.config.rope, 8, torch.tensor(1), 2, torch.float32)  # [D]
    keys.data = rotate(straight.view(2, 8, 32).mT, cos, sin).mT.reshape(16, 32)
    loss, relations, kl = step.relation_loss(teacher, student, IDS, torch.float32, logit_weight=1.0)
    assert relations.abs().max() < 1e-5 and kl > 0.01
    loss.backward()  # a small step down it is one towards where the keys stood
    assert (keys.grad * (keys - straight)).sum() > 0


def test_the_compute_dtype_is_chosen_with_a_reason_and_can_be_asked_for(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has, dtype, reason in (
        ("AMX", torch.bfloat16, "AMX"),
        ("AVX512-BF16", torch.bfloat16, "AVX512-BF16"),
        (None, torch.float32, "no fast bfloat16"),
    ):
        monkeypatch.setattr(precision, "cpu_bfloat16", lambda has=has: has)
        chosen, why = choose_dtype(cpu)
        assert chosen == dtype and reason in why
        assert choose_dtype(gpu)[0] == torch.bfloat16
        assert choose_dtype(cpu, "float32") == (torch.float32, "--dtype says so")
        assert choose_dtype(gpu, "bfloat16")[0] == torch.bfloat16
    with pytest.raises(ValueError, match=r"--dtype is 'half'"):
        choose_dtype(cpu, "half")


@pytest.mark.parametrize("instructions", ["AMX", "AVX512-BF16", None])
def test_bfloat16_on_a_cpu_is_as_exact_as_eager_and_gives_the_same_bits_twice(
    instructions, monkeypatch
):
    """Against float64: logits and the gradient of q_proj, error <= 2 x that of plain bfloat16."""
    monkeypatch.setattr(precision, "cpu_bfloat16", lambda: instructions)
    assert attention_dtype(torch.bfloat16, torch.device("cpu")) == (
        torch.bfloat16 if instructions == "AMX" else torch.float32
    )

    def run(dtype, backend):
        teacher = random_model().to(torch.bfloat16).to(dtype)  # the same numbers in each
        student = make_student(teacher, teacher.config.extended("yarn", 8))
        if dtype == torch.float64:
            for p in trainable(student).values():
                p.data = p.data.double()
        with torch.nn.attention.sdpa_kernel(backend):
            h = student.hidden(IDS, dtype)
            next_token_loss(student, h, IDS).backward()
        logits = student.lm_head(h).detach()
        return [logits.double(), student.model.layers[0].self_attn.q_proj.weight.grad.double()]

    math, flash = torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION
    exact = run(torch.float64, math)
    ours, again = run(torch.bfloat16, flash), run(torch.bfloat16, flash)
    monkeypatch.setattr(model_file, "attention_dtype", lambda dtype, device: dtype)
    eager = run(torch.bfloat16, math)
    for a, b, e, x in zip(ours, again, eager, exact, strict=True):
        assert torch.equal(a, b)
        assert (a - x).norm() <= 2 * (e - x).norm()
