"""The commands of ``ral-gym``, their arguments, and how they report errors; `ral_gym.commands.cli` joins them."""
