"""Trainings in float64 whose results must not depend on how many processes share them: a program for ``torchrun``.

``python tests/joint_cases.py FOLDER [NAME ..]`` trains every case and writes ``FOLDER/RANK.safetensors``: the codes of
all rollouts, and at the end weights, random state and a digest of the whole state.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from stable_baselines3.common.callbacks import BaseCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from ral_gym.agents import find_algorithm, make_sb3_env
from ral_gym.agents.check_processes import CheckProcesses
from ral_gym.agents.defaults import algorithm_defaults, policy_for
from ral_gym.agents.regularizers import PriorKLReward
from ral_gym.agents.train_ral import make_stage
from ral_gym.agents.vec_env import CodeVecEnv
from ral_gym.config import Config, ReinforceConfig
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.rewards.augmentation import AUGMENTATIONS
from ral_gym.runs.alike import digest
from ral_gym.runs.run import Run, random_state, read_config
from ral_gym.runs.sharing import Processes
from ral_gym.stages.levels import load_generator, load_vqvae
from ral_gym.tokenizers.code_set import CodeSet
from tests.label_models import make_prior
from tests.tiny import make_tiny_run

CPU = torch.device("cpu")
Found = dict[str, torch.Tensor]
Case = Callable[[Processes, Path], Found]
CASES: dict[str, Case] = {}


class Codes(BaseCallback):
    """Keeps the codes of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.kept.append(self.model.rollout_buffer.codes.astype(np.int64).reshape(-1))  # type: ignore[attr-defined]


class Masked(CodeVecEnv):
    """Even codes at even positions, odd ones at odd ones."""

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        grid = self.world.grid
        legal = np.arange(grid.codebook_size) % 2 == np.arange(grid.n_codes)[:, None] % 2
        return list(legal[self.core.position])


def trained(model: Any, callbacks: list[BaseCallback], updates: int = 5) -> Found:
    """A model after some updates."""
    model.policy.double()
    before = {name: weight.clone() for name, weight in model.policy.named_parameters()}
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    model.policy.optimizer.register_step_post_hook(count)
    if getattr(model, "_reference", None) is not None:
        model._reference.double()
    codes = Codes()
    model.learn(updates * model.n_steps * model.env.num_envs, callback=[*callbacks, codes, CheckProcesses(every=2)])
    state = {name: weight for name, weight in model.policy.state_dict().items() if weight.is_floating_point()}
    whole = [state, model.policy.optimizer.state_dict(), model.env.core.state_dict(), random_state()]
    found = {f"policy.{name}": weight.clone() for name, weight in state.items()}
    return found | {
        "codes": torch.from_numpy(np.concatenate(codes.kept)),
        "random": torch.get_rng_state(),
        "digest": torch.tensor(digest(whole)),
        "rollouts": torch.tensor(len(codes.kept)),
        "steps": torch.tensor(steps),
        "moved": max((weight - before[name]).abs().max().detach() for name, weight in model.policy.named_parameters()),
    }


def toy(algo: str, n_envs: int = 7, callbacks: Callable[[], list[BaseCallback]] = list, **changes: Any) -> Case:
    """An algorithm on the toy world, with a PixelCNN."""

    def case(processes: Processes, folder: Path) -> Found:
        options = {"reset_mode": "mixed", "lockstep": True} | changes
        env = make_sb3_env("ral_gym/Toy-v0", n_envs, seed=0, **{k: options.pop(k) for k in ("reset_mode", "lockstep")})
        if options.pop("masked", False):
            env.__class__ = Masked
        torch.manual_seed(1)
        sizes = {"hidden_units": 12, "residual_units": 12, "layers": 2, "conv_filter_size": 3}
        prior = PixelCNN(8, 4, 4, **sizes, output_stack_layers=1)  # type: ignore[arg-type]
        return trained(*made(algo, env, prior, processes, callbacks(), **options))

    return case


def made(
    algo: str, env: Any, prior: Any, processes: Processes, callbacks: list[BaseCallback], **options: Any
) -> tuple[Any, list[BaseCallback]]:
    """A model whose policy knows the processes."""
    arguments = algorithm_defaults(algo, env, prior=prior) | {"seed": 3, "device": "cpu"} | options
    arguments["policy_kwargs"] = {**arguments["policy_kwargs"], "processes": processes}
    if algo not in ("reinforce", "grpo"):
        arguments["n_steps"] = 21  # rollouts end inside episodes
    return find_algorithm(algo).cls(policy_for(algo), env, **arguments), callbacks


def classes(algo: str, **options: Any) -> Case:
    """An algorithm on the toy world with classes, with a transformer."""

    def case(processes: Processes, folder: Path) -> Found:
        env = make_sb3_env("ral_gym/ToyClasses-v0", 8, seed=0)
        return trained(*made(algo, env, make_prior(), processes, [], **options))

    return case


def stage(levels: int = 1, n_envs: int = 7, updates: int = 4, changes: Any = None, **ral: Any) -> Case:
    """The whole of stage 3, from a run folder that process 0 makes."""

    def case(processes: Processes, folder: Path) -> Found:
        path = folder / "run"
        if processes.main:
            shutil.rmtree(path, ignore_errors=True)
            make_tiny_run(path, levels=levels)
        processes.wait()
        config: Config = read_config(path)
        critic = dataclasses.replace(config.critic, **(changes or {}), held_out=3)
        settings = {"n_envs": n_envs, "n_updates": updates, "learning_rate": 1e-4, **ral}
        config = dataclasses.replace(config, critic=critic, ral=dataclasses.replace(config.ral, **settings))
        run = Run.__new__(Run)  # config.json is the tiny run's
        run.listeners = []
        run.path, run.config = path, config
        vqvae = load_vqvae(run, CPU).double()  # type: ignore[attr-defined]
        prior: Any = load_generator(run, "prior", CPU)
        codes = CodeSet.load(path / "codes.safetensors", vqvae.grid)
        made_stage = make_stage(run, vqvae, prior, codes, CPU, False, processes)
        env: Any = made_stage.model.env
        env.world.decode.args[0].double()
        assert made_stage.critic is not None or not config.ral.uses_critic
        found: Found = {}
        if made_stage.critic is not None:
            made_stage.critic.critic.double()
        model: Any = made_stage.model
        found |= trained(model, [*made_stage.callbacks.callbacks], updates)
        if made_stage.critic is not None:
            weights = made_stage.critic.critic.state_dict()
            found |= {f"critic.{name}": weight.clone() for name, weight in weights.items()}
            found["digest"] = torch.tensor(digest([found["digest"], made_stage.reward_callback.state_dict()]))
        return found

    return case


CASES["reinforce"] = toy("reinforce", batch_size=32, kl_coef=0.1, ent_coef=0.01)
CASES["reinforce_value"] = toy("reinforce", n_envs=3, baseline="value", reset_mode="full", lockstep=False)
CASES["grpo"] = toy("grpo", n_envs=8, group_size=4, target_kl=1e-9, n_epochs=4, kl_coef=0.1, batch_size=40)
CASES["ppo"] = toy("ppo", lockstep=False, batch_size=8, target_kl=1e-3, callbacks=lambda: [PriorKLReward(0.1)])
CASES["ppo_few"] = toy("ppo", n_envs=2, reset_mode="full", batch_size=2)
CASES["a2c"] = toy("a2c", lockstep=False)
CASES["trpo"] = toy("trpo", lockstep=False, sub_sampling_factor=2, batch_size=32)
CASES["maskable_ppo"] = toy("maskable_ppo", masked=True, lockstep=False, batch_size=32)
CASES["labels_reinforce"] = classes("reinforce")
CASES["labels_trpo"] = classes("trpo")
CASES["stage_wgan"] = stage(reset_mode="mixed", algo="reinforce", mle_coef=0.1)
CASES["stage_hinge_terms"] = stage(
    changes={"loss": "hinge", "gradient_penalty": 0.0, "batch_size": 2},
    algo="ppo",
    mle_coef=0.1,
    mle_dropout=True,
    reward_features="pyramid",
    reward_weights={"critic": 1.0, "loo_fd": 1.0, "kid": 0.5},
)
CASES["stage_patch_options"] = stage(
    changes={"loss": "hinge", "augment": AUGMENTATIONS, "r1": 0.3, "r1_every": 2, "spectral_norm": True},
    updates=2,
    algo="reinforce",
    reset_mode="mixed",
)
CASES["stage_all_actions"] = stage(
    changes={"kind": "causal"},
    updates=2,
    algo="reinforce",
    reset_mode="mixed",
    reinforce=ReinforceConfig(all_actions=True, batch_size=20),
)
CASES["stage_causal"] = stage(
    changes={"kind": "causal", "batch_size": 5},
    updates=3,
    algo="grpo",
    n_envs=8,
    reset_mode="mixed",
    mle_coef=0.2,
    mle_dropout=True,
    reward_weights={"critic": 1.0, "loo_fd": 1.0},
    reward_features="pyramid",
)
CASES["stage_causal_levels"] = stage(levels=2, changes={"kind": "causal", "batch_size": 2}, updates=2, algo="reinforce")
CASES["stage_levels"] = stage(levels=2, updates=3, algo="reinforce", train_levels="top", reset_mode="full")
CASES["stage_rollouts"] = stage(updates=2, algo="grpo", n_envs=4, n_rollouts=3, rollout_positions=3, reset_mode="full")


def main(folder: Path, names: list[str]) -> None:
    """Train the cases."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    processes = Processes.join("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    everything: Found = {}
    for name in names or CASES:
        torch.manual_seed(0)
        np.random.seed(0)
        found = CASES[name](processes, folder)
        everything |= {f"{name}/{key}": value.contiguous() for key, value in found.items()}
    save_file(everything, folder / f"{processes.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
