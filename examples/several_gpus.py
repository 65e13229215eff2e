"""Unmodified PPO from Stable-Baselines3 on several GPUs, or on several processes of a CPU, in a script of your own.

    torchrun --nproc-per-node 8 examples/several_gpus.py --run runs/demo --n-envs 256
    python examples/several_gpus.py                                   # the same with one process

Every process runs this whole script. ``Processes.join()``, given to the policy, lets them share its passes: the
script then computes what one process would compute, with the same global `n_envs`, and faster where passes of networks
take most of the time. `CheckProcesses` notices a process that is missing or computes other numbers. Only the main
process prints and saves. See docs/several_gpus.md.
"""

import argparse
import time

from stable_baselines3 import PPO

from ral_gym.agents import (
    CheckProcesses,
    CompositeReward,
    PriorPolicy,
    Processes,
    algorithm_defaults,
    make_sb3_env,
)
from ral_gym.assets import asset_path


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run folder with a trained tokenizer and prior; without it: the bundled faces")
    parser.add_argument("--n-envs", type=int, default=16, help="images per update, over all processes")
    parser.add_argument("--updates", type=int, default=5, help="policy updates")
    parser.add_argument("--save", help="where to save the model, as NAME.zip")
    return parser.parse_args()


def main() -> None:
    """Train, and print what an update takes."""
    arguments = parse_arguments()
    processes = Processes.join()  # before anything else: each process chooses its GPU
    run = arguments.run or str(asset_path("faces"))
    env = make_sb3_env("ral_gym/LatentCode-v0", arguments.n_envs, seed=0, run=run, reward="none")
    keywords = algorithm_defaults("ppo", env, prior=run)
    keywords["policy_kwargs"]["processes"] = processes
    keywords["n_epochs"] = 1
    # The same seed everywhere: the processes draw the same random numbers.
    model = PPO(PriorPolicy, env, seed=0, **keywords)
    reward = CompositeReward({"loo_fd": 1.0})  # of distributions: FD without each image
    start = time.monotonic()
    steps = arguments.updates * model.n_steps * env.num_envs
    model.learn(steps, callback=[reward, CheckProcesses()], progress_bar=False)
    if processes.main:
        seconds = (time.monotonic() - start) / arguments.updates
        print(f"{processes.size} processes, {env.num_envs} images per update, {seconds:.2f} s per update")
        if arguments.save:
            model.save(arguments.save)


if __name__ == "__main__":
    main()
