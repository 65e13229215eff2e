"""From photos to an RL-tuned image generator, in one command.

    python examples/train_celeba.py                                  # the 400 bundled faces, minutes on a CPU
    python examples/train_celeba.py --algo ppo                       # the same with PPO in stage 3
    python examples/train_celeba.py --preset celeba64 --data celeba:/data/celeba   # the paper's Table 4, for a GPU

Images -> VQ-VAE -> PixelCNN by maximum likelihood -> reinforced adversarial learning through the Gymnasium environment
-> a table and pictures that put the generators side by side. Run it again to continue, or to see the table.
"""

import sys

from ral_gym.commands.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
