"""A speculator from settings: n-grams of the text, or a smaller model from a folder.

In: the target's folder and the settings. Out: a `Speculator`, or a `SettingsError` that says why
this draft model cannot guess for this target. Blocks while weights are read.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.decode.draft import DraftModel
from services.decode.settings import SpeculationSettings
from services.decode.speculation import SpeculationPolicy
from services.decode.speculator import NgramProposer, Proposer, Speculator
from shared.errors import SettingsError
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from shared.runtime.kv_memory import num_kv_blocks
from shared.runtime.language import load_language
from shared.runtime.model_dir import find_model_dir


def load_speculator(
    folder: ModelFolder, settings: SpeculationSettings, block_size: int
) -> Speculator | None:
    """Who guesses for the model in `folder`; None if nobody is to."""
    if settings.mode == "off":
        return None
    proposer: Proposer
    if settings.mode == "ngram":
        proposer = NgramProposer()
    else:
        proposer = _load_draft_model(folder, settings, block_size)
    return Speculator(SpeculationPolicy(settings.max_draft_tokens), proposer)


def _load_draft_model(
    target: ModelFolder, settings: SpeculationSettings, block_size: int
) -> DraftModel:
    try:
        directory = find_model_dir(settings.draft_model)
    except SettingsError as error:
        raise SettingsError(
            f"--draft-model = {settings.draft_model!r}: "
            "neither a folder nor a hub id of the form owner/name"
        ) from error
    spec = ModelSpec.load(directory)
    check_same_tokens(target.directory, target.spec, directory, spec)
    folder = replace(target, directory=directory, spec=spec)
    num_blocks = num_kv_blocks(folder.geometry(block_size), settings.draft_kv_bytes)
    model, kv = load_language(folder, block_size, num_blocks)
    num_target_tokens = target.spec.text.vocab_size
    return DraftModel(model, kv, num_target_tokens=num_target_tokens)


def check_same_tokens(
    target_dir: Path, target: ModelSpec, draft_dir: Path, draft: ModelSpec
) -> None:
    """Raise `SettingsError` unless a token id means the same to both models."""
    tokens, draft_tokens = _tokens(target_dir), _tokens(draft_dir)
    if tokens is None and draft_tokens is None:
        if target.text.vocab_size != draft.text.vocab_size:
            raise SettingsError(
                f"--draft-model {draft_dir}: its vocabulary has {draft.text.vocab_size} tokens, "
                f"the model's has {target.text.vocab_size}"
            )
        return
    if tokens != draft_tokens:
        raise SettingsError(
            f"--draft-model {draft_dir}: its tokenizer.json does not list the tokens of "
            f"{target_dir}: {_difference(tokens or {}, draft_tokens or {})}"
        )
    largest = max((tokens or {}).values(), default=0)
    if largest >= draft.text.vocab_size:
        raise SettingsError(
            f"--draft-model {draft_dir}: its embedding has {draft.text.vocab_size} rows, "
            f"the tokenizer's ids go up to {largest}"
        )


def _tokens(directory: Path) -> dict[str, int] | None:
    """Text to id of every token, added ones included; None without a tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        content: Any = json.loads(path.read_bytes())
        vocab = content["model"]["vocab"]
        if isinstance(vocab, list):  # unigram models list [text, score] by id
            vocab = {text: token_id for token_id, (text, _) in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is not a tokenizer: {error}") from error
    return {**vocab, **added}


def _difference(tokens: dict[str, int], draft_tokens: dict[str, int]) -> str:
    if len(tokens) != len(draft_tokens):
        return f"{len(draft_tokens)} tokens, not {len(tokens)}"
    text = next(text for text, token_id in tokens.items() if draft_tokens.get(text) != token_id)
    return f"{text!r} has id {draft_tokens.get(text)}, not {tokens[text]}"
