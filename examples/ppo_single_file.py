"""PPO for a sequence model in one file, after CleanRL's ppo.py: the native vector environment, no SB3.

    python examples/ppo_single_file.py                                            # solves the toy, see below
    python examples/ppo_single_file.py --env-id ral_gym/Faces-v0 --total-timesteps 262144    # from the bundled prior
    python examples/ppo_single_file.py --prior runs/demo/prior.safetensors --env-id ...      # from any PixelCNN
    tensorboard --logdir runs                                                     # charts/* and losses/*

Prints the mean reward of the images ten times on the way and of fresh ones at the end: on the toy 0.93 to 0.99
(three seeds; solved from 0.9 on) after 5,120 images, in about 10 s of one CPU core.

The policy is a PixelCNN. What differs from ppo.py, each marked (n) below:

1. An episode is an image of T codes and `num_steps` is T, so that a rollout is one whole image per environment.
2. In the rollout a `CachedSampler` draws: a step costs one position of the network, not one pass over the image.
3. In the update one teacher-forced pass over B images gives the log-probabilities of all their B x T codes; therefore
   minibatches are whole images.
4. Observations are not stored: an observation is the codes before it, and those are the actions.
5. gamma = lambda = 1: the first code deserves the terminal reward as much as the last, and the horizon is finite.
6. Nothing is bootstrapped: every rollout ends on an episode's last code, whose termination is real, not a time limit.
7. The value head reads detached features and the position: its loss must not disturb a pretrained prior.
8. Dropout is off in the update too (`eval`), else the ratio of an unchanged policy would not be 1.
9. Autoreset is SAME_STEP: the observation after the last code is already the next empty grid, no step is wasted.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn, optim
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter

import ral_gym  # noqa: F401 (registers the environments)
from ral_gym.assets import asset_path
from ral_gym.priors.pixelcnn import PixelCNN
from ral_gym.priors.sampler import CachedSampler, draw
from ral_gym.runs.storage import load_module, save_module

BUNDLED_PRIORS = {"ral_gym/Faces-v0": "faces/prior.safetensors", "ral_gym/Oracle-v0": "oracle/prior.safetensors"}


@dataclass
class Args:
    """CleanRL's arguments, and the prior to start from."""

    exp_name: str = Path(__file__).stem
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = False
    """if toggled, cuda is used where there is a device"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases (`pip install wandb`)"""
    wandb_project_name: str = "ral_gym"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    save_model: bool = False
    """whether to save the PixelCNN into the `runs/{run_name}` folder"""

    env_id: str = "ral_gym/Toy-v0"
    """the id of the environment"""
    prior: str | None = None
    """file of the PixelCNN to start from; None: the environment's, or on the toy random weights"""
    total_timesteps: int = 81_920
    """codes to draw"""
    learning_rate: float | None = None
    """the learning rate of the optimizer; None: 2e-3 from random weights, 1e-4 from a prior"""
    num_envs: int = 64
    """the number of parallel environments, that is images per rollout"""
    anneal_lr: bool = True
    """toggle learning rate annealing"""
    gamma: float = 1.0
    """the discount factor gamma (5)"""
    gae_lambda: float = 1.0
    """the lambda for the general advantage estimation (5)"""
    num_minibatches: int = 4
    """the number of minibatches of whole images (3)"""
    update_epochs: int = 4
    """the K epochs to update the policy"""
    norm_adv: bool = True
    """toggles advantages normalization"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    clip_vloss: bool = False
    """toggles whether or not to use a clipped loss for the value function"""
    ent_coef: float = 0.02
    """coefficient of the entropy"""
    vf_coef: float = 0.5
    """coefficient of the value function"""
    max_grad_norm: float = 0.5
    """the maximum norm for the gradient clipping"""
    target_kl: float | None = 0.02
    """the target KL divergence threshold"""

    # to be filled in runtime
    num_steps: int = 0
    """the codes of an image, T: the steps of a rollout (1)"""
    batch_size: int = 0
    """the batch size, in images"""
    minibatch_size: int = 0
    """the mini-batch size, in images"""
    num_iterations: int = 0
    """the number of iterations"""


class Agent(nn.Module):
    """A PixelCNN as the actor, a small head on its features as the critic.

    Args:
        prior: the PixelCNN.
    """

    def __init__(self, prior: PixelCNN) -> None:
        super().__init__()
        self.prior = prior
        self.critic = nn.Sequential(nn.Linear(prior.hidden_units + 1, 64), nn.Tanh(), nn.Linear(64, 1))

    def get_value(self, features: Tensor, position: Tensor) -> Tensor:
        """Features (..., C) and positions (...) in [0, 1] to values (...) (7)."""
        return self.critic(torch.cat([features.detach(), position[..., None]], -1)).squeeze(-1)

    def evaluate_images(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, entropy and value (B, T) each, of all codes (B, T) in one pass (3)."""
        features = self.prior.features(codes)  # (B, T, C)
        probs = Categorical(logits=self.prior.logits(features))  # (B, T, K)
        position = torch.arange(codes.shape[1], device=codes.device) / codes.shape[1]  # (T,)
        return probs.log_prob(codes), probs.entropy(), self.get_value(features, position.expand(codes.shape))


def make_prior(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> tuple[PixelCNN, bool]:
    """The PixelCNN to start from, and whether it is a trained one."""
    path = args.prior
    if path is None and args.env_id in BUNDLED_PRIORS:
        path = str(asset_path(BUNDLED_PRIORS[args.env_id]))
    if path is not None:
        return load_module(Path(path), PixelCNN, device).requires_grad_(True), True
    grid = envs.unwrapped.world.grid  # type: ignore[attr-defined]
    small: dict[str, Any] = {"hidden_units": 24, "residual_units": 24, "layers": 1, "conv_filter_size": 3}
    return PixelCNN(grid.codebook_size, grid.height, grid.width, **small).to(device), False


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    run_name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            sync_tensorboard=True,
            config=vars(args),
            name=run_name,
            save_code=True,
        )
    writer = SummaryWriter(f"runs/{run_name}")

    # TRY NOT TO MODIFY: seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # env setup: E episodes over one batched core; their images are decoded and scored together (9)
    envs = gym.make_vec(args.env_id, num_envs=args.num_envs, reset_mode="full", device=str(device))
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs, buffer_length=args.num_envs)
    args.num_steps = envs.unwrapped.world.grid.n_codes  # type: ignore[attr-defined]
    args.batch_size = args.num_envs
    args.minibatch_size = args.num_envs // args.num_minibatches
    args.num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    threshold = gym.spec(args.env_id).reward_threshold

    prior, trained = make_prior(args, envs, device)
    args.learning_rate = args.learning_rate or (1e-4 if trained else 2e-3)
    agent = Agent(prior).to(device).eval()  # (8)
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    sampler = CachedSampler(agent.prior)
    writer.add_text(
        "hyperparameters", "\n".join(["|param|value|", "|-|-|", *(f"|{k}|{v}|" for k, v in vars(args).items())])
    )

    # ALGO Logic: Storage setup (4)
    T, E = args.num_steps, args.num_envs
    actions = torch.zeros((T, E), dtype=torch.int64, device=device)
    logprobs, rewards, dones, values = (torch.zeros((T, E), device=device) for _ in range(4))

    # TRY NOT TO MODIFY: start the game
    global_step = 0
    start_time = time.time()
    next_obs, _ = envs.reset(seed=args.seed)

    for iteration in range(1, args.num_iterations + 1):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / args.num_iterations) * args.learning_rate

        # The weights have changed: pack them again, and look at the grids, which are empty (1, 2).
        sampler.refresh()
        sampler.begin(torch.as_tensor(next_obs, dtype=torch.int64, device=device), position=0)
        for step in range(T):
            global_step += E
            # ALGO LOGIC: action logic
            with torch.no_grad():
                actions[step], logprobs[step] = draw(sampler.logits(), torch.rand(E, device=device))
                values[step] = agent.get_value(sampler.features(), torch.full((E,), step / T, device=device))
            sampler.advance(actions[step])

            # TRY NOT TO MODIFY: execute the game and log data.
            next_obs, reward, terminations, truncations, infos = envs.step(actions[step].cpu().numpy())
            rewards[step] = torch.as_tensor(reward, device=device)
            dones[step] = torch.as_tensor(terminations, device=device)

        returns_of_images = infos["episode"]["r"]  # (E,): all ended with this step
        assert terminations.all()
        writer.add_scalar("charts/episodic_return", returns_of_images.mean(), global_step)
        writer.add_scalar("charts/episodic_length", infos["episode"]["l"].mean(), global_step)
        if iteration % max(1, args.num_iterations // 10) == 0:
            print(f"global_step={global_step}, images={iteration * E}, episodic_return={returns_of_images.mean():.3f}")

        # advantages: dones[t] says that step t was an episode's last, so nothing after it counts (6)
        with torch.no_grad():
            advantages = torch.zeros_like(rewards)
            lastgaelam = torch.zeros(E, device=device)
            for t in reversed(range(T)):
                nextvalues = values[t + 1] if t + 1 < T else 0.0
                nextnonterminal = 1.0 - dones[t]
                delta = rewards[t] + args.gamma * nextvalues * nextnonterminal - values[t]
                advantages[t] = lastgaelam = delta + args.gamma * args.gae_lambda * nextnonterminal * lastgaelam
            returns = advantages + values

        # the batch: one row per image, (E, T)
        b_codes, b_logprobs, b_advantages = actions.T.contiguous(), logprobs.T, advantages.T
        b_returns, b_values = returns.T, values.T

        # Optimizing the policy and value network
        b_inds = np.arange(args.batch_size)
        clipfracs = []
        for _epoch in range(args.update_epochs):
            np.random.shuffle(b_inds)
            for start in range(0, args.batch_size, args.minibatch_size):
                mb_inds = torch.as_tensor(b_inds[start : start + args.minibatch_size], device=device)

                newlogprob, entropy, newvalue = agent.evaluate_images(b_codes[mb_inds])  # (B, T) each
                logratio = newlogprob - b_logprobs[mb_inds]
                ratio = logratio.exp()

                with torch.no_grad():
                    # calculate approx_kl http://joschu.net/blog/kl-approx.html
                    old_approx_kl = (-logratio).mean()
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfracs += [((ratio - 1.0).abs() > args.clip_coef).float().mean().item()]

                mb_advantages = b_advantages[mb_inds]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)

                # Policy loss
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()

                # Value loss
                v_loss = (newvalue - b_returns[mb_inds]) ** 2
                if args.clip_vloss:
                    change = (newvalue - b_values[mb_inds]).clamp(-args.clip_coef, args.clip_coef)
                    v_loss = torch.max(v_loss, (b_values[mb_inds] + change - b_returns[mb_inds]) ** 2)
                v_loss = 0.5 * v_loss.mean()

                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss * args.vf_coef

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

            if args.target_kl is not None and approx_kl > args.target_kl:
                break

        y_pred, y_true = b_values.cpu().numpy(), b_returns.cpu().numpy()
        var_y = np.var(y_true)
        explained_var = np.nan if var_y == 0 else 1 - np.var(y_true - y_pred) / var_y

        # TRY NOT TO MODIFY: record losses for plotting purposes
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("losses/value_loss", v_loss.item(), global_step)
        writer.add_scalar("losses/policy_loss", pg_loss.item(), global_step)
        writer.add_scalar("losses/entropy", entropy_loss.item(), global_step)
        writer.add_scalar("losses/old_approx_kl", old_approx_kl.item(), global_step)
        writer.add_scalar("losses/approx_kl", approx_kl.item(), global_step)
        writer.add_scalar("losses/clipfrac", np.mean(clipfracs), global_step)
        writer.add_scalar("losses/explained_variance", explained_var, global_step)
        writer.add_scalar("charts/SPS", int(global_step / (time.time() - start_time)), global_step)

    seconds = time.time() - start_time
    sampler.refresh()
    envs.reset(seed=args.seed + 1)
    fresh = sampler.sample(E)[0]  # (E, T)
    for column in fresh.T:
        infos = envs.step(column.cpu().numpy())[4]
    solved = "" if threshold is None else f" (solved from {threshold} on)"
    print(f"{args.num_iterations * E} images in {seconds:.0f} s; mean reward of {E} fresh ones: ", end="")
    print(f"{infos['episode']['r'].mean():.3f}{solved}")
    if args.save_model:
        path = Path("runs") / run_name / "prior.safetensors"
        save_module(path, agent.prior)
        print(f"model saved to {path}")
    envs.close()
    writer.close()
