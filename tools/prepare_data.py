"""Make the data folder of a config: tokenizer, CPT corpora, SFT examples, prompts, preferences, held-out sets.

Of message catalogues (megatron_tower/data/prepare.py) or of public text at any size (megatron_tower/curation, docs/data.md).

Run:  python -m tools.prepare_data data=catalogues model=tiny_gemma2
"""

from megatron_tower.command import entry_point
from megatron_tower.config import Config
from megatron_tower.curation import folder as curated
from megatron_tower.data import prepare as catalogues
from megatron_tower.runtime import cpu


@entry_point
def main(cfg: Config) -> None:
    cpu.install()
    curated.prepare(cfg) if cfg.data.curation else catalogues.prepare(cfg)


if __name__ == "__main__":
    main()
