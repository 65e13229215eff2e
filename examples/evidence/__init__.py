"""What the experiments share: grids of variants, tables, figures and sentences made of their numbers."""
