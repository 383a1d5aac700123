"""Make the data folder of a config: tokenizer, CPT corpora, SFT examples, held-out sets (megatron_tower/data/prepare.py).

Run:  python -m tools.prepare_data data=catalogues model=tiny_gemma2
"""

from megatron_tower.command import entry_point
from megatron_tower.config import Config
from megatron_tower.data.prepare import prepare
from megatron_tower.runtime import cpu


@entry_point
def main(cfg: Config) -> None:
    cpu.install()
    prepare(cfg)


if __name__ == "__main__":
    main()
