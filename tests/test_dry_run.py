"""The dry run against the real models: parameters, operations and memory without computing anything."""

import dataclasses
import resource
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ral_gym.commands.cli import train_main
from ral_gym.commands.cost_of_ral import PENALTY_PASSES, ral_cost
from ral_gym.commands.cost_of_sharing import READ, sharing_of
from ral_gym.commands.counting import StageCost
from ral_gym.commands.dry_run import dry_run
from ral_gym.config import Config
from ral_gym.errors import ConfigError
from ral_gym.metrics.features import make_extractor
from ral_gym.presets import PRESETS, SMOKE, get_preset
from ral_gym.rewards.critic import PatchCritic, gradient_penalty
from ral_gym.stages.levels import prior_of
from ral_gym.stages.processes import Compute
from ral_gym.tokenizers.base import tokenizer_of

TWO = dataclasses.replace(
    SMOKE,
    vqvae=dataclasses.replace(SMOKE.vqvae, layers=2, levels=2),
    bottom=dataclasses.replace(SMOKE.prior, hidden_units=8, residual_units=8, conditioning_stack_layers=1),
    ral=dataclasses.replace(SMOKE.ral, train_levels="bottom"),
)


def stage(config: Config, number: int, **options: Any) -> StageCost:
    return dry_run(config, **options).stages[number]


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "length", "sides"),
    [
        ("celeba64", 64, ((8, 8),)),
        ("celeba128", 1280, ((16, 16), (32, 32))),
        ("celebahq512", 5120, ((32, 32), (64, 64))),
    ],
)
def test_the_papers_sizes(name, length, sides) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = dry_run(get_preset(name))
    # Nothing was allocated: the weights of the larger ones alone are gigabytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert result.grid.n_codes == length and result.grid.shapes == sides
    assert [cost.steps for cost in result.stages[: len(sides) + 1]] == [
        get_preset(name).vqvae.training_steps,
        *(prior.training_steps for prior in (get_preset(name).prior, get_preset(name).bottom)[: len(sides)]),
    ]
    assert all(cost.flops_per_step > 0 and cost.memory > 4 * cost.parameters for cost in result.stages)


def test_parameters_are_those_of_the_models() -> None:
    config = get_preset("demo")
    costs = dry_run(config).stages
    vqvae = tokenizer_of(config, 64, 1)
    assert costs[0].parameters == parameters(vqvae)
    assert costs[1].parameters == costs[2].parameters == parameters(prior_of(config, vqvae.grid))
    colour = dataclasses.replace(config, data=dataclasses.replace(config.data, source="folder:x"))
    assert stage(colour, 0).parameters == parameters(tokenizer_of(colour, 64, 3))


def test_operations_of_a_prior_are_those_of_a_real_step() -> None:
    config = TWO
    grid = tokenizer_of(config, 32, 1).grid
    for level in range(2):
        prior = prior_of(config, grid, level)
        codes = [torch.zeros(16, size, dtype=torch.int64) for size in grid.level_sizes]
        with FlopCounterMode(display=False) as counter:
            logits = prior(codes[0]) if level == 0 else prior(codes[1], codes[0])
            logits.sum().backward()
        assert stage(config, 1 + level).flops_per_step == counter.get_total_flops()


@pytest.mark.parametrize("config", [SMOKE, TWO], ids=["one level", "two levels"])
def test_operations_of_the_vq_vae_are_encoder_lookup_and_decoder(config) -> None:
    vqvae, cost = tokenizer_of(config, 32, 1), stage(config, 0)
    images = torch.zeros(1, 1, 32, 32)
    with FlopCounterMode(display=False) as counter:
        vqvae.encode_features(images)
    encoder = counter.get_total_flops()
    maps = vqvae.lookup([torch.zeros(1, size, dtype=torch.int64) for size in vqvae.grid.level_sizes])
    with FlopCounterMode(display=False) as counter:
        vqvae.paint(maps)
    assert cost.parts["decoder"] == counter.get_total_flops()
    lookup_of_encode = 2 * 16 * 8 * vqvae.grid.level_sizes[0]  # `encode_features` looks the top codes up
    assert cost.parts["encoder"] in (encoder, encoder - lookup_of_encode)
    assert cost.parts["lookup"] == 2 * 16 * 8 * vqvae.grid.n_codes
    forward = 16 * (cost.parts["encoder"] + cost.parts["decoder"])
    assert 2 * forward < cost.flops_per_step < 3 * forward + 16 * cost.parts["lookup"] + 1


def test_a_gradient_penalty_costs_six_forward_passes(monkeypatch) -> None:
    critic = PatchCritic(64, 3, hidden_units=64, layers=4)
    images = torch.rand(2, 3, 64, 64)

    def count(run: Any) -> int:
        counter = FlopCounterMode(display=False)
        # Its module hooks do not take a gradient of a gradient.
        monkeypatch.setattr(counter, "mod_tracker", Tracker())
        with counter:
            run()
        return counter.get_total_flops()

    class Tracker:
        parents = {"Global"}  # noqa: RUF012

        def __enter__(self) -> None: ...

        def __exit__(self, *arguments: object) -> None: ...

    forward = count(lambda: critic(images))
    penalty = count(lambda: gradient_penalty(critic, images, images.clone()).backward())
    assert penalty / forward == pytest.approx(PENALTY_PASSES, rel=0.01)


def test_parts_precision_and_processes_take_memory_and_leave_operations() -> None:
    config = get_preset("celeba64")
    whole, parts = stage(config, 1), stage(config, 1, compute=Compute(gradient_accumulation=8))
    half, four = stage(config, 1, compute=Compute("bf16")), stage(config, 1, processes=4)
    assert parts.flops_per_step == four.flops_per_step == half.flops_per_step == whole.flops_per_step
    assert parts.memory < four.memory < half.memory < whole.memory
    fixed = 20 * whole.parameters  # weights, gradients, two moments, one average
    assert (whole.memory - fixed) / (parts.memory - fixed) == pytest.approx(8, rel=0.01)
    assert (whole.memory - fixed) / (half.memory - fixed) == pytest.approx(2, rel=0.01)


def test_ral_tunes_the_levels_it_is_told_to() -> None:
    both = dataclasses.replace(TWO, ral=dataclasses.replace(TWO.ral, train_levels="both"))
    top = dataclasses.replace(TWO, ral=dataclasses.replace(TWO.ral, train_levels="top"))
    counts = [dry_run(config).stages[-1].parameters for config in (top, TWO, both)]
    assert counts[0] + counts[1] == counts[2] and counts[1] == stage(TWO, 2).parameters


def test_the_estimate_is_near_what_autograd_keeps() -> None:
    config = dataclasses.replace(SMOKE, prior=dataclasses.replace(SMOKE.prior, batch_size=32))
    prior = prior_of(config, tokenizer_of(config, 32, 1).grid)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not any(tensor.data_ptr() == p.data_ptr() for p in prior.parameters()):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = prior(torch.zeros(32, 16, dtype=torch.int64))
    assert stage(config, 1).memory - 20 * parameters(prior) == pytest.approx(sum(kept.values()), rel=0.2)
    assert logits.requires_grad


def allocated(step: Any) -> int:
    """The most bytes that torch's allocator had given out at once during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("codebook_size", "layers", "batch_size", "levels"),
    [(128, 3, 32, 1), (1024, 2, 8, 1), (4096, 2, 8, 1), (16_384, 2, 10, 1), (512, 2, 16, 2)],
)
def test_the_memory_of_stage_1_is_what_a_step_allocates(
    codebook_size: int, layers: int, batch_size: int, levels: int
) -> None:
    sizes = {"codebook_size": codebook_size, "layers": layers, "batch_size": batch_size, "levels": levels}
    settings = dataclasses.replace(SMOKE.vqvae, **sizes, hidden_units=32, residual_units=16)
    config = dataclasses.replace(SMOKE, data=dataclasses.replace(SMOKE.data, image_size=64), vqvae=settings)
    model = tokenizer_of(config, 64, 1)
    for quantiser in model.quantisers:  # k-means comes once, at the first step
        quantiser._codebook.initted.fill_(True)
        quantiser._codebook.embed.normal_()
    images, optimizer = torch.rand(batch_size, 1, 64, 64), torch.optim.Adam(model.parameters())

    def step() -> None:
        model.training_loss(images)[0].backward()
        optimizer.step()

    model.train()
    fixed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert stage(config, 0).memory == pytest.approx(fixed + allocated(step), rel=0.3)


def test_settings_that_do_not_fit_are_refused() -> None:
    wrong = dataclasses.replace(SMOKE, prior=dataclasses.replace(SMOKE.prior, dropout=2.0))
    with pytest.raises(ConfigError, match=r"prior\.dropout is 2\.0"):
        dry_run(wrong)


@pytest.mark.parametrize("name", ["demo", "demo-2level", "demo-attention"])
def test_what_is_for_a_cpu_fits_one(name) -> None:
    costs = dry_run(PRESETS[name]).stages
    assert max(cost.memory for cost in costs) < 2**30
    assert sum(cost.flops_per_step * cost.steps for cost in costs) < 60e12


def stage_3(config: Config) -> StageCost:
    """Stage 3 alone: the networks of stages 1 and 2 take seconds to count."""
    with torch.device("meta"):
        tokenizer = tokenizer_of(config, config.data.image_size, 3)
        prior = prior_of(config, tokenizer.grid)
    return ral_cost(config, tokenizer, [prior], tokenizer.grid)


def recipe(layers: int = 12, ral: dict[str, Any] | None = None, grpo: dict[str, Any] | None = None) -> Config:
    """LlamaGen-B and the recipe, with changes."""
    base = dataclasses.replace(get_preset("llamagen-b"), ral=get_preset("llamagen-grpo").ral)
    grpo_section = dataclasses.replace(base.ral.grpo, **(grpo or {}))
    changed = dataclasses.replace(base.ral, grpo=grpo_section, **(ral or {}))
    return dataclasses.replace(base, prior=dataclasses.replace(base.prior, layers=layers), ral=changed)


def test_stage_3_of_the_recipe_counts_its_passes_and_its_reward_networks() -> None:
    """Drawing, log-probabilities before the update, two epochs, the reference, CLIP, HPS, Inception."""
    n, whole = 144, stage_3(recipe())
    matrices = 12 * (4 * 768**2 + 3 * 768 * 2048) + 768 * 16_384  # blocks and output
    forward = 256 * 2 * matrices + 12 * 4 * 256**2 * 768  # and attention, all pairs
    assert whole.parts["drawing"] == pytest.approx(forward, rel=0.01)
    assert whole.parts["clip"] == pytest.approx(162e9, rel=0.01)
    assert whole.parts["hps"] == pytest.approx(335e9, rel=0.01)
    per_image = forward * (1 + 1 + 2 * 3 + 2) + sum(whole.parts.values()) - whole.parts["drawing"]
    assert whole.flops_per_step == pytest.approx(n * per_image, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"grpo": {"mixed_precision": "no"}}, -1),
        ({"grpo": {"n_epochs": 1}}, -4),
        ({"ral": {"kl_coef": 0.0}}, -2),
        ({"ral": {"guidance": 2.0}}, 1 + 9),
        ({"ral": {"guidance": 2.0, "guidance_log_probs": "plain"}}, 1),
    ],
)
def test_each_setting_of_stage_3_has_its_passes(changes: dict[str, Any], passes: int) -> None:
    before, after = stage_3(recipe(1)), stage_3(recipe(1, **changes))
    change = passes * 144 * before.parts["drawing"]
    assert after.flops_per_step - before.flops_per_step == pytest.approx(change, rel=0.02)


def test_memory_of_stage_3_has_the_cache_and_the_parts_of_a_batch() -> None:
    plain = {"reward_weights": {"kid": 1.0}, "reward_features": "encoder"}
    one, sixteen, all_at_once = (stage_3(recipe(ral=plain, grpo={"batch_size": b})) for b in (256, 4096, 36_864))
    cache = 144 * 2 * 12 * 256 * 768 * 4  # keys and values in float32
    weights, tokenizer = 110_120_448 * 4, 71_883_403 * 4
    assert one.memory == pytest.approx(7 * weights + tokenizer + cache, rel=0.01)  # twice frozen, five times trained
    assert one.memory == sixteen.memory < all_at_once.memory  # a part needs less than the cache, the whole batch more
    rewarded = stage_3(recipe(ral={"reward_weights": {"clip": 1.0}}))
    assert rewarded.memory - sixteen.memory > 4 * 303_000_000  # CLIP's image tower


def test_fresh_fakes_are_drawn_too() -> None:
    fresh = dataclasses.replace(SMOKE, critic=dataclasses.replace(SMOKE.critic, fakes="fresh"))
    costs = [stage(config, -1) for config in (SMOKE, fresh)]
    assert costs[1].flops_per_step - costs[0].flops_per_step == SMOKE.ral.n_envs * costs[0].parts["drawing"]


def test_roll_outs_are_drawn_by_half_and_scored() -> None:
    ral = dataclasses.replace(SMOKE.ral, reward="single")
    one, four = (dataclasses.replace(ral, n_rollouts=number, rollout_positions=5) for number in (1, 4))
    before, after = (stage(dataclasses.replace(SMOKE, ral=settings), -1) for settings in (one, four))
    parts = before.parts
    each = parts["drawing"] // 2 + parts["decoder"] + parts["critic"]
    assert after.flops_per_step - before.flops_per_step == SMOKE.ral.n_envs * 3 * 5 * each


def test_lite0_counts_the_layers_that_it_runs() -> None:
    """Half of the network: what is behind block 10 is left out."""
    ral = dataclasses.replace(SMOKE.ral, reward_weights={"loo_fd": 1.0}, reward_features="lite0")
    cost = stage(dataclasses.replace(SMOKE, ral=ral), -1)
    counter = FlopCounterMode(display=False)
    with counter:
        make_extractor("lite0")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert cost.parts["lite0"] == counter.get_total_flops()


def test_stage_3_gains_from_gpus_only_with_images_to_go_with_them() -> None:
    config = get_preset("celeba128")  # the paper's 16 images
    *_, top, bottom, cost = dry_run(config).stages
    more = dry_run(dataclasses.replace(config, ral=dataclasses.replace(config.ral, n_envs=512))).stages[-1]
    few, many, alone = sharing_of(cost, 8), sharing_of(more, 8), sharing_of(cost, 1)
    assert few.efficiency < 0.4 < 0.8 < many.efficiency < 1
    assert alone.efficiency == 1 and alone.sending == 0
    # Reading the weights of both networks once per code is what no number of GPUs shortens.
    assert sharing_of(cost, 10_000).seconds > cost.read / READ
    assert cost.read == 256 * top.sent + 1024 * bottom.sent
    assert cost.sent > top.sent + bottom.sent  # and the critic's


def test_memory_of_stage_3_falls_with_processes() -> None:
    one, four = (dry_run(get_preset("celeba64"), processes=processes).stages[-1].memory for processes in (1, 4))
    assert four < one


def test_dry_run_of_several_gpus_says_what_does_not_scale(capsys) -> None:
    assert train_main(["--preset", "celeba64", "--dry-run", "--processes", "8"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "8 GPUs, on paper" in said and "Stage 3 draws 2 images per process" in said
    assert "raise ral.n_envs (to 240" in said
    assert train_main(["--preset", "celeba64", "--dry-run", "--processes", "32"]) == 0
    assert "Stage 3 would be refused: ral.n_envs is 16" in " ".join(capsys.readouterr().out.split())
    assert train_main(["--preset", "celeba64", "--processes", "8"]) == 2
    assert "--processes 8 belongs to --dry-run" in capsys.readouterr().err
