"""``ral_gym/Toy-v0``: the colour wheel, 4 x 4 codes, no learned weights."""

from __future__ import annotations

from ral_gym.envs.generation import RegisteredEnv
from ral_gym.envs.vector import RegisteredVectorEnv
from ral_gym.envs.worlds import toy_world


class ToyEnv(RegisteredEnv):
    """Draw 4 x 4 coloured tiles so that each tile is the next colour after its neighbour.

    ## Description

    The generation MDP with an analytic decoder and a known reward, to learn, test and teach with. The neighbour is the
    tile to the left, in the first column the one above; the first tile is free. There are 8 perfect images.

    >>> import gymnasium as gym, ral_gym
    >>> env = gym.make("ral_gym/Toy-v0", render_mode="ansi")
    >>> observation, info = env.reset(seed=0)
    >>> for code in [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 0]:
    ...     observation, reward, terminated, truncated, info = env.step(code)
    >>> print(env.render(), end="")
    0 1 2 3
    1 2 3 4
    2 3 4 5
    3 4 5 0
    >>> reward, terminated, truncated
    (0.9375, True, False)

    Many episodes at once:

    >>> envs = gym.make_vec("ral_gym/Toy-v0", num_envs=3)
    >>> observations, infos = envs.reset(seed=0)
    >>> for code in range(16):
    ...     observations, rewards, terminations, truncations, infos = envs.step([code % 8, code // 2, 0])
    >>> rewards
    array([0.8125, 0.3125, 0.0625])
    >>> infos["final_info"]["codes"][1]
    array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7], dtype=int16)

    ## Action Space

    ``Discrete(8)``: the next tile's colour.

    ## Observation Space

    ``Box(0, 9, (16,), int16)``: the tiles in raster order; 8 means "not drawn yet", 9 "will not be drawn in this
    episode".

    ## Rewards

    0 until the last tile. Then the share of tiles that obey the rule (`reward="single"`), or their number
    (`reward="intermediate"`; ``info["step_rewards"]`` has 1 or 0 for every drawn tile). `reward="none"`: always 0.
    A random policy scores 0.18; the best possible is 1 (or 16), and from 0.9 on (`reward="single"`) the task counts as
    solved: ``spec.reward_threshold``.

    >>> envs = gym.make_vec("ral_gym/Toy-v0", num_envs=3, reward="intermediate")
    >>> observations, infos = envs.reset(seed=0)
    >>> for code in range(16):
    ...     observations, rewards, terminations, truncations, infos = envs.step([code % 8, code // 2, 0])
    >>> rewards
    array([13.,  5.,  1.])
    >>> infos["final_info"]["step_rewards"][0].reshape(4, 4)
    array([[1., 1., 1., 1.],
           [0., 1., 1., 1.],
           [0., 1., 1., 1.],
           [0., 1., 1., 1.]], dtype=float32)

    ## Starting State

    As `LatentCodeEnv`; the real images are the 8 perfect ones.

    >>> observation, info = env.reset(options={"prefix_rows": 2, "image_index": 3})
    >>> print(env.render(), end="")
    3 4 5 6
    4 5 6 7
    . . . .
    . . . .
    >>> observation, info = env.reset(options={"stop_rows": 1})
    >>> observation
    array([8, 8, 8, 8, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], dtype=int16)

    ## Episode End

    `terminated` after the episode's last tile. `truncated` is always False.

    ## Information

    At the last step only: `codes` (16,) int16, `score_map` (4, 4) float32, `step_rewards` (16,) float32.

    ## Arguments

    `reward`, `reset_mode`, `render_mode`, `device`, `forbidden_codes`: as `LatentCodeEnv`. `gym.make_vec` takes
    `autoreset_mode`, `lockstep` and `paired` too: see `GenerationVectorEnv`.

    ## Version History

    * v0: first release.
    """

    make_world = staticmethod(toy_world)


class ToyVectorEnv(RegisteredVectorEnv):
    """Many `ToyEnv` episodes at once; `GenerationVectorEnv` explains the arguments."""

    make_world = staticmethod(toy_world)
