"""The Tower+ recipe (CPT -> SFT -> WPO -> GRPO) on Megatron-Core, launched on Slurm."""

__version__ = "0.1.0"
