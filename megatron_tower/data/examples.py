"""`Example`: one chat turn with a checkable answer, as `sft/train.jsonl` holds it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """task: `translation` (anything about a translation) or `general`. kind: which of them. locale: the language learnt."""

    prompt: str
    answer: str
    task: str
    kind: str
    locale: str

    def row(self) -> dict:
        messages = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]
        return {"messages": messages, "task": self.task, "kind": self.kind, "locale": self.locale}
