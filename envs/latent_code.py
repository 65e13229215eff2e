"""``ral_gym/LatentCode-v0``: draw in the code space of any run folder."""

from __future__ import annotations

from ral_gym.envs.from_run import run_world
from ral_gym.envs.generation import RegisteredEnv
from ral_gym.envs.vector import RegisteredVectorEnv


class LatentCodeEnv(RegisteredEnv):
    """Draw an image code by code in the code space of a trained VQ-VAE, for the score of a frozen critic.

    ## Description

    A VQ-VAE has turned images into grids of H x W discrete codes, each one of K. An episode writes such a grid in
    raster order, one code a step. After its last code the grid is decoded to an image and a PatchGAN critic scores it
    (Ak et al. 2020, Section 4). The critic is frozen: `CriticCallback` of `ral_gym.agents` trains its own copy.

    ```python
    import gymnasium as gym
    import ral_gym

    env = gym.make("ral_gym/LatentCode-v0", run="runs/demo", reset_mode="continue", render_mode="rgb_array")
    observation, info = env.reset(seed=0)
    terminated = False
    while not terminated:
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    picture = env.render()
    ```

    ``gym.make_vec("ral_gym/LatentCode-v0", num_envs=64, run="runs/demo")`` steps 64 episodes and decodes and scores
    them in one batch; `GenerationVectorEnv` explains its further arguments.

    ## Action Space

    ``Discrete(K)``: the next code.

    ## Observation Space

    ``Box(0, K + 1, (T,), int16)``, T = H * W: the codes in raster order. K means "not drawn yet" (the next position is
    the first K), K + 1 "will not be drawn in this episode": without it a short episode would not be Markov.

    If the run's prior was trained with N classes, the episode's class is part of the state:
    ``Box(0, K + 1 + N, (T + 1,), int16)``, whose last entry is the label K + 2 + class, from the first step on.
    ``env.unwrapped.world.class_names`` are the classes' names.

    ## Rewards

    0 until the last code. Then the mean of the normalised score map (`reward="single"`, Eq. 6), or the sum of
    ``info["step_rewards"]`` (`reward="intermediate"`), the score map upsampled to the code grid: the reward of every
    drawn code, known only at the end. `reward="none"`: always 0, for a callback that writes rewards itself.

    Use a discount of 1: with 0.99 a terminal reward reaches the first of 64 codes at half its size, the first of 256
    at 8 %.

    ## Starting State

    * `reset_mode="full"`: nothing drawn.
    * `"continue"`: n rows of a real image's codes are given, n uniform in 1..H-1.
    * `"scratch"`: nothing drawn, and the episode stops after n rows, n a multiple of (code rows / score-map rows).
    * `"mixed"`: one of the last two at random (Section 4.3).

    `reset(options=...)` overrides it for one episode. Omitted options are drawn at random; wrong values raise
    `ValueError`.

    * `mode`: one of the above.
    * `prefix_rows`: 0..H-1 rows of a real image are given.
    * `stop_rows`: the episode stops after this row, a multiple of (code rows / score-map rows).
    * `image_index`: which real image the given rows come from; alone, it means `mode="continue"`.
    * `codes`: the given codes themselves: a grid (H, W), some rows of it, or a prefix (n,); the codes before the first
      K or K + 1 are given. With classes also a whole observation (T + 1,), with its label.
    * `label`: with classes, the class of the image, a number from 0 or a name. An image to continue is then drawn among
      those of the class, unless `image_index` or `codes` is given. Without the option the label is that of the
      continued image, else drawn: see `label_draw`.

    ## Episode End

    `terminated` after the episode's last code. `truncated` is always False.

    ## Information

    Empty until the last step; with classes a reset gives `label`, an int from 0, and so does the last step. At the last
    step also `codes` (the last observation), and unless `reward="none"` `score_map` (h, w) float32, 0 below the last
    drawn row, and `step_rewards` (T,) float32, 0 at codes that the episode did not draw itself; its sum is the reward.

    ## Arguments

    * `run`: path of a run folder, such as ``runs/demo``, with stages 1 and 2 done; with stage 3 unless `reward="none"`.
    * `reward`: `single`, `intermediate` or `none`.
    * `reset_mode`: `full`, `continue`, `scratch` or `mixed`.
    * `render_mode`: `rgb_array` (the decoded image so far, undrawn cells grey) or `ansi`.
    * `device`: `cpu`, `cuda` or `cuda:N`: where images are decoded and scored.
    * `label_draw`: with classes, how the class of an episode is drawn: `uniform`, or `data`, as often as among the real
      images.
    * `forbidden_codes`: codes that ``env.unwrapped.action_masks()`` excludes.
    * `top_k`: the masks allow only the k codes that the run's prior finds likeliest after the codes so far. Masks are
      meant for `MaskablePPO`; `step` accepts every code.
    * `plugins`: modules that register parts, or ``module:Class`` names that the run's files may use; otherwise a file
      that names code is refused.

    ## Version History

    * v0: first release.
    """

    make_world = staticmethod(run_world)


class LatentCodeVectorEnv(RegisteredVectorEnv):
    """Many `LatentCodeEnv` episodes at once; `GenerationVectorEnv` explains the arguments."""

    make_world = staticmethod(run_world)
