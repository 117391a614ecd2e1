"""Linears in e4m3: which, what the copy shares with its original, and how it follows it."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from reelforge.engine.core import rng
from reelforge.engine.core.errors import ConfigError
from reelforge.engine.model.lora import LoraConfig, inject, lora_parameters, merge
from reelforge.engine.model.precision import Fp8Policy, fp8_copy, fp8_linears, requantise
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.rl.policy import PathConfig, Policy
from reelforge.kernels.errors import KernelError

SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 256,
    "num_layers": 4,
}
SHAPE = (16, 3, 4, 4)
T = torch.tensor([900.0, 500.0])


def model(seed: int = 0) -> WanTransformer:
    made = WanTransformer.from_config(SMALL, seed)
    made.proj_out.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return made


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return rng.normal(range(2), SHAPE), T, rng.normal(range(2, 4), (5, 16))


@torch.no_grad()
def velocity(network: WanTransformer) -> Tensor:
    return network(*inputs())


def rel_l2(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def test_the_policy_of_wan_as_data() -> None:
    wan = WanTransformer.from_config(
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, device="meta"
    )  # 1.3B
    table = dict(Fp8Policy().table(wan))
    assert Counter(table.values()) == {"rows": 28 * 5, "groups": 28 * 3, None: len(table) - 28 * 8}
    of_block = {name.removeprefix("blocks.7."): how for name, how in table.items() if name.startswith("blocks.7.")}
    assert of_block == {
        **dict.fromkeys(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ffn.net.0.proj"), "rows"),
        **dict.fromkeys(("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"), "groups"),
        **dict.fromkeys(("attn2.to_k", "attn2.to_v")),
    }
    spared = ("blocks.0.", "blocks.29.", "condition_embedder.", "proj_out")
    assert not any(how for name, how in table.items() if name.startswith(spared))


def test_the_copy_shares_all_but_its_e4m3() -> None:
    original = model()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    twin = fp8_copy(original, Fp8Policy())
    mine = dict(original.named_parameters())
    theirs = dict(twin.named_parameters())
    assert theirs.keys() == mine.keys() - {f"{name}.weight" for name, how in Fp8Policy().table(original) if how}
    assert all(theirs[name] is mine[name] for name in theirs)
    assert len(list(fp8_linears(twin))) == 2 * 8 and not list(fp8_linears(original))
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_the_copy_computes_nearly_the_same() -> None:
    original = model()
    assert 1e-3 < rel_l2(velocity(fp8_copy(original, Fp8Policy())), velocity(original)) < 0.05
    every = rel_l2(velocity(fp8_copy(original, Fp8Policy(spared=0))), velocity(original))
    assert every > rel_l2(velocity(fp8_copy(original, Fp8Policy(rows=()))), velocity(original))


def test_the_copy_follows_its_original() -> None:
    original = model()
    twin = fp8_copy(original, Fp8Policy())
    for parameter in original.parameters():
        parameter.data += 0.02 * rng.normal([1], parameter.shape)[0]
    stale = velocity(twin)
    requantise(twin)
    assert torch.equal(velocity(twin), velocity(fp8_copy(original, Fp8Policy())))
    assert not torch.equal(velocity(twin), stale)


def test_adapters_are_merged_before_they_are_rounded() -> None:
    adapted, merged = model(), model()
    for network in (adapted, merged):
        inject(network, LoraConfig(rank=2, alpha=4.0), seed=1)
        for name, parameter in lora_parameters(network):
            parameter.data = 0.2 * rng.normal([rng.key(name)], parameter.shape)[0]
    merge(merged)
    copies = [fp8_copy(network, Fp8Policy()) for network in (adapted, merged)]
    for one, other in zip(*map(fp8_linears, copies), strict=True):
        assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
    # The adapters of the spared blocks stay beside their weights, so there sums are rounded in another order.
    torch.testing.assert_close(*map(velocity, copies), rtol=1e-2, atol=1e-3)
    assert rel_l2(velocity(copies[0]), velocity(fp8_copy(model(), Fp8Policy()))) > 0.1


def test_bf16_weights_and_autocast() -> None:
    original = model()
    right = velocity(original)
    with torch.autocast("cpu", torch.bfloat16):
        assert rel_l2(velocity(fp8_copy(original, Fp8Policy())), right) < 0.05
    x, t, text = inputs()
    half = fp8_copy(original.to(torch.bfloat16), Fp8Policy())
    with torch.no_grad():
        assert rel_l2(half(x.bfloat16(), t, text.bfloat16()).float(), right) < 0.05


@pytest.mark.parametrize("lora", [False, True])
def test_a_rollout_in_fp8_leaves_the_trained_step_alone(lora: bool) -> None:
    """Its velocity is that of the training forward bit for bit, so ratios on policy are exactly 1."""
    network = model()
    if lora:
        inject(network, LoraConfig(rank=2, alpha=4.0), seed=1)
    x, t, text = inputs()
    paths = {name: PathConfig(3.0, sample_precision=name) for name in ("bf16", "fp8")}
    policies = {name: Policy(network, torch.cat((text, text[:1])), path, "bf16") for name, path in paths.items()}
    for policy in policies.values():
        policy.prepare((0, 1))
    fp8, bf16 = policies["fp8"], policies["bf16"]
    assert torch.equal(fp8.detached_train(x, t, (0, 1)), fp8.train(x, t, (0, 1)).detach())
    assert torch.equal(fp8.detached_train(x, t, (0, 1)), bf16.detached_train(x, t, (0, 1)))
    assert 1e-3 < rel_l2(fp8.sample(x, t, (0, 1)), bf16.sample(x, t, (0, 1))) < 0.1
    before = fp8.sample(x, t, (0, 1))
    weight = network.blocks[1].ffn.net[2].weight
    weight.data += 0.1 * rng.normal([1], weight.shape)[0]
    fp8.prepare((0, 1))
    assert not torch.equal(fp8.sample(x, t, (0, 1)), before), "each batch of groups is sampled by the present weights"


def test_a_model_that_fp8_would_not_touch_and_sizes_it_does_not_take() -> None:
    shallow = WanTransformer.from_config(SMALL | {"num_layers": 2})
    with pytest.raises(ConfigError, match=r"quantise nothing: the model has 2 blocks.*bf16"):
        fp8_copy(shallow, Fp8Policy())
    narrow = WanTransformer.from_config(SMALL | {"num_attention_heads": 3})
    with pytest.raises(KernelError, match=r"cannot be e4m3"):
        fp8_copy(narrow, Fp8Policy())


def test_what_is_no_copy_has_nothing_to_requantise() -> None:
    original = model()
    before = velocity(original)
    requantise(original)
    assert torch.equal(velocity(original), before) and isinstance(original.blocks[1].attn1.to_q, nn.Linear)
