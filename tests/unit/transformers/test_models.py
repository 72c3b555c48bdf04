"""`experts_implementation="megamoe"` in tiny models on a CPU: logits as eager has them, and what is refused."""

from __future__ import annotations

import copy
import io
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import megamoe_jit as mm
import megamoe_jit.transformers as plugin
from megamoe_jit.reference import calc_diff
from megamoe_jit.transformers.adapter import ATTRIBUTE
from tests.unit.transformers.models import MODELS, experts_of, make, tokens

pytestmark = pytest.mark.filterwarnings("ignore:experts_implementation=.megamoe. on a CPU")


@pytest.fixture(scope="module")
def experts():
    """An experts module."""
    return experts_of(make("Qwen3MoeConfig", "megamoe"))[0]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_eager_and_switching_back_gives_its_bits(name: str):
    model = make(name)
    model.set_experts_implementation("eager")
    eager = logits(model)
    model.set_experts_implementation("megamoe")
    ours = logits(model)
    assert all(hasattr(module, ATTRIBUTE) for module in experts_of(model))
    assert 0 < calc_diff(ours, eager) < 1e-3
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), eager)


def test_the_clamp_of_a_model_is_the_layers():
    """DeepSeek-V4's, at a tenth: without it logits are far away."""
    model = make("DeepseekV4Config", "megamoe")
    ours = logits(model)
    (module, *_) = experts_of(model)
    assert getattr(module, ATTRIBUTE).layer.clamp == 0.1
    plugin.release(model)
    for each in experts_of(model):
        each.limit = 100.0
    assert calc_diff(logits(model), ours) > 2e-3


def test_generate_gives_what_steps_by_hand_give():
    model = make("Qwen3MoeConfig", "megamoe", torch.bfloat16)
    prompt = tokens(4)
    by_hand = prompt
    with torch.no_grad():
        for _ in range(2):
            by_hand = torch.cat((by_hand, model(by_hand).logits[:, -1:].argmax(-1)), 1)
    for cache in ("dynamic", "static"):
        made = model.generate(prompt, max_new_tokens=2, do_sample=False, cache_implementation=cache)
        assert torch.equal(made, by_hand)


def test_a_model_is_made_with_it_from_a_folder(tmp_path):
    make("MixtralConfig").save_pretrained(tmp_path)
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, experts_implementation="megamoe")
    assert calc_diff(logits(model), logits(load(tmp_path, experts_implementation="eager"))) < 1e-3


def test_what_is_saved_is_what_it_was(tmp_path):
    model = make("Qwen3MoeConfig", "megamoe")
    before = copy.deepcopy(model.state_dict())
    logits(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_loaded_weights_are_the_layers_from_the_next_call_on():
    model, other = make("Qwen3MoeConfig", "megamoe"), make("Qwen3MoeConfig", "megamoe")
    for module in experts_of(other):
        module.gate_up_proj.data.mul_(0.5)
    logits(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_a_copy_of_a_model_computes_the_same():
    model = make("Qwen3MoeConfig", "megamoe")
    found = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), found)


def test_a_model_that_is_sent_computes_the_same():
    """A weak reference cannot be sent: where the model arrives, its layers are made anew."""
    model = make("Qwen3MoeConfig", "megamoe")
    found = logits(model)
    sent = io.BytesIO()
    torch.save(model, sent)
    sent.seek(0)
    assert torch.equal(logits(torch.load(sent, weights_only=False)), found)


def test_layers_are_made_once():
    model = make("Qwen3MoeConfig", "megamoe")
    for wrong in (0, -1, 33, "2", 2.0):
        with pytest.raises(mm.ConfigError, match="topk = .* is not supported; allowed: "):
            plugin.prepare(model, wrong)
    assert plugin.prepare(model) == 2
    made = [getattr(module, ATTRIBUTE) for module in experts_of(model)]
    logits(model)
    logits(model)
    assert [getattr(module, ATTRIBUTE) for module in experts_of(model)] == made
    assert plugin.release(model) == 2
    assert plugin.release(model) == 0


def layers_of(model) -> list:
    return [getattr(module, ATTRIBUTE).layer for module in experts_of(model)]


def test_layers_of_values_stay_while_another_implementation_computes():
    model = make("Qwen3MoeConfig", "megamoe")
    ours, made = logits(model), layers_of(model)
    model.set_experts_implementation("eager")
    logits(model)
    model.state_dict()
    model.set_experts_implementation("megamoe")
    assert torch.equal(logits(model), ours)
    assert all(now is before for now, before in zip(layers_of(model), made, strict=True))
    gone = weakref.ref(made.pop())
    del made
    assert plugin.release(model) == 2
    assert gone() is None, "the memory of a layer is given back where it is asked for"
    assert not any(hasattr(module, ATTRIBUTE) for module in experts_of(model))


def doubled_in_place(module) -> None:
    module.down_proj.mul_(2.0)


def doubled_elsewhere(module) -> None:
    module.down_proj = torch.nn.Parameter(2.0 * module.down_proj)


def doubled_behind(module) -> None:
    module.down_proj.data = 2.0 * module.down_proj.data


def doubled_somewhere(module) -> None:
    """Where a parameter was, there is another one: as after an allocation in memory that was just given back."""
    before = module.down_proj
    module.down_proj = torch.nn.Parameter(before.data)
    module.down_proj.data.mul_(2.0)
    assert (module.down_proj.data_ptr(), module.down_proj._version) == (before.data_ptr(), before._version)


@torch.no_grad()
@pytest.mark.parametrize("change", [doubled_in_place, doubled_elsewhere, doubled_behind, doubled_somewhere])
@pytest.mark.parametrize("between", [None, "eager"])
def test_values_that_change_are_the_layers_from_the_next_call_on(change, between: str | None):
    (module, *_) = experts_of(make("Qwen3MoeConfig", "megamoe"))
    x, ids, weights = torch.randn(3, 128), torch.tensor([[0, 1], [2, 3], [1, 3]]), torch.rand(3, 2)
    module.down_proj = torch.nn.Parameter(module.down_proj.data)  # nothing was written into it yet
    before = module(x, ids, weights)
    module.config._experts_implementation = between or "megamoe"
    change(module)
    if between:
        module(x, ids, weights)
        module.config._experts_implementation = "megamoe"
    assert torch.equal(module(x, ids, weights), 2.0 * before)


def test_layers_of_values_whose_changes_are_not_counted_do_not_stay():
    with torch.inference_mode():
        model = make("Qwen3MoeConfig", "megamoe")
        before = logits(model)
        model.set_experts_implementation("eager")
        for module in experts_of(model):
            module.down_proj.mul_(2.0)
        logits(model)
        model.set_experts_implementation("megamoe")
        assert not torch.equal(logits(model), before)


def test_a_copy_has_layers_of_its_own_that_stay():
    model = make("Qwen3MoeConfig", "megamoe")
    found = logits(model)
    copied = copy.deepcopy(model)
    made = layers_of(copied)
    assert torch.equal(logits(copied), found)
    assert all(now is before for now, before in zip(layers_of(copied), made, strict=True))


@torch.no_grad()
def test_a_copy_of_values_that_were_written_since_computes_with_them():
    (module, *_) = experts_of(make("Qwen3MoeConfig", "megamoe"))
    x, ids, weights = torch.randn(3, 128), torch.tensor([[0, 1], [2, 3], [1, 3]]), torch.rand(3, 2)
    before = module(x, ids, weights)
    module.down_proj.mul_(2.0)
    copied = copy.deepcopy(module)
    for each in (module, copied):
        assert torch.equal(each(x, ids, weights), 2.0 * before)


def test_fewer_slots_are_masked_ones_and_more_make_another_layer():
    """Expert parallelism brings tokens with one slot each in one of its ways, and all slots in the other."""
    (module, *_) = experts_of(make("Qwen3MoeConfig", "megamoe"))
    x, ids = torch.randn(3, 128), torch.tensor([[0, 1], [2, 3], [1, 3]])
    weights = torch.rand(3, 2)
    with torch.no_grad():
        both = module(x, ids, weights)
        alone = [module(x, ids[:, slot : slot + 1], weights[:, slot : slot + 1]) for slot in range(2)]
        assert calc_diff(sum(alone), both) < 1e-5
        masked = module(x, torch.tensor([[0, 4], [4, 4], [1, -1]]), weights)  # ids of other ranks' experts
        assert torch.equal(masked[1], torch.zeros(128))
        assert getattr(module, ATTRIBUTE).topk == 2
        module(x, ids.repeat(1, 2), weights.repeat(1, 2))
        assert getattr(module, ATTRIBUTE).topk == 4
        assert module(x[:0], ids[:0], weights[:0]).shape == (0, 128)


def test_no_backward_pass_is_said_and_not_left_out():
    model = make("Qwen3MoeConfig", "megamoe")
    with pytest.raises(mm.ConfigError, match=r"no backward pass.*no_grad"):
        model(tokens())


def test_on_a_cpu_it_says_that_this_is_for_trials():
    model = make("Qwen3MoeConfig", "megamoe")
    with pytest.warns(UserWarning, match="on a CPU computes by the reference"):
        logits(model)


REFUSED = {
    "has_bias": (True, "has_bias = True"),
    "is_transposed": (True, "is_transposed = True"),
    "is_concatenated": (False, "is_concatenated = False"),
    "has_gate": (False, "has_gate = False"),
    "has_post_expert_norm": (True, "has_post_expert_norm = True"),
    "swiglu_alpha": (1.7, "swiglu_alpha = 1.7"),
    "gate_softcap": (30.0, "gate_softcap = 30.0"),
    "act_fn": (torch.nn.GELU(), "computes something else than silu"),
    "_apply_gate": (lambda both: both, "computes something else than silu"),
    "_hf_hook": (SimpleNamespace(offload=True), "offloaded"),
    "_hf_hook, one of several": (SimpleNamespace(hooks=[SimpleNamespace(offload=True)]), "offloaded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_experts_module_is_refused_with_the_reason(experts, name: str):
    value, says = REFUSED[name]
    module = copy.deepcopy(experts)
    setattr(module, name.partition(",")[0], value)
    with torch.no_grad(), pytest.raises(mm.ConfigError, match=says):
        module.forward(torch.randn(1, 128), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    assert not hasattr(module, ATTRIBUTE)


def test_lora_on_experts_is_refused_and_what_was_before_it_comes_after_it(experts):
    """PEFT makes a parameter a computed one, for as long as a call of a model takes."""

    class Added(torch.nn.Module):
        def forward(self, base):
            return base + 1

    module = copy.deepcopy(experts)
    batch = torch.randn(3, 128), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with torch.no_grad():
        before = module(*batch)
        torch.nn.utils.parametrize.register_parametrization(module, "gate_up_proj", Added())
        with pytest.raises(mm.ConfigError, match="computes gate_up_proj at each call, as LoRA on experts does"):
            module(*batch)
        torch.nn.utils.parametrize.remove_parametrizations(module, "gate_up_proj", leave_parametrized=False)
        assert torch.equal(module(*batch), before)


def test_gpt_oss_is_refused():
    import transformers

    sizes = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GptOssConfig(**sizes, **heads, num_experts_per_tok=2), experts_implementation="megamoe"
    )
    with pytest.raises(mm.ConfigError, match="has has_bias = True: biases, .*experts_implementation=.grouped_mm"):
        logits(model)


def test_other_implementations_are_as_they_were():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make("Qwen3MoeConfig", "grouped_mm")
        assert torch.isfinite(logits(model)).all()
        assert not any(hasattr(module, ATTRIBUTE) for module in experts_of(model))
