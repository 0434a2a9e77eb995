"""The page "Your model, ten minutes", on three checkpoints with tokenizers of their own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from examples import fresh_start, printed
from tiny_models import make_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hookpoints import embedded
from writesae.cli import main, parse
from writesae.flags import Prompt
from writesae.page.prompt import PromptServer

PAGE = Path(__file__).parents[1] / "docs" / "your_model.md"
VOCAB = 384


def save_checkpoint(model_type: str, text: str, folder: Path) -> None:
    """A tiny random model, and byte pairs of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    make_hf(model_type, vocab_size=VOCAB).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", ["qwen3_5", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("mamba2", "rwkv7"))]
)
def test_a_checkpoint_is_taken_from_loading_to_a_circuit(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = embedded.text("train")[:120_000]
    (tmp_path / "my-text.txt").write_text(text)
    save_checkpoint(model_type, text, tmp_path / "my-model")
    shown: dict[str, Any] = {"__name__": "__main__"}
    with fresh_start(tmp_path):
        for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            if language == "python":
                printed(block, PAGE.name, shown)
                continue
            for line in block.splitlines():
                _, command, *words = shlex.split(line)
                if command != "prompt":
                    main([command, *words])
                    continue
                with PromptServer(parse(Prompt, "writesae prompt", [*words, "--port", "0"])) as server:
                    session = server.session
                    asked = {"text": "The crops were good. We are at peace.", "question": "The crops were"}
                    first = session.prompted(**asked).sentences()[0][:2]
                    answer: Any = session.answer("/memory", asked | {"spans": [(*first, None)]})
                    assert answer["kl"] > 0 and session.reader().fitted.longest == 8
                    assert any(session.atoms(asked)["L0H0"])
        assert list(Path("writesae-out/atoms").glob("atom-*.html")) and Path("circuit.svg").is_file()
    assert "my-model" in capsys.readouterr().out
