"""The contrastive objective: true captions first, wrong ones wrong, held-out ones never seen."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm_pipeline.data.world import World, held_out_caption
from ldm_pipeline.errors import UserError
from ldm_pipeline.models.text import tokenise
from ldm_pipeline.training import clip
from ldm_pipeline.training.clip import ClipObjective, wrong_captions
from tests.training import laws
from tests.training.conftest import SmallWorld


@pytest.fixture
def objective(clip_objective: ClipObjective) -> ClipObjective:
    """A copy that the test may train."""
    return copy.deepcopy(clip_objective)


def test_the_laws_of_objectives(objective: ClipObjective) -> None:
    laws.a_batch_is_a_function_of_its_positions(objective)
    laws.everything_trained_has_a_gradient(objective)


def test_the_true_caption_is_first_and_the_others_differ(clip_objective: ClipObjective) -> None:
    batch = clip_objective.batch(range(20))
    assert batch["pictures"].shape == (20, 3, 128, 128)
    assert batch["tokens"].shape == (20, 4, 48)
    captions = [World(0).told(i)[2] for i in range(20)]
    true = tokenise(clip_objective.tokenizer, captions, warn=False).input_ids
    assert torch.equal(batch["tokens"][:, 0], true)
    for row in batch["tokens"]:
        assert not (row[1:] == row[0]).all(dim=1).any()


def test_no_held_out_caption_is_trained_on() -> None:
    """Of 1,500 captions, wrong ones included, some 75 would be, were they not kept out."""
    world, found, loose = World(0), 0, 0
    for i in range(300):
        _, description, caption = world.told(i)
        strict = wrong_captions(description, np.random.default_rng(i), 4)
        assert len(strict) == 4
        found += sum(held_out_caption(text) for text in [caption, *strict])
        free = wrong_captions(description, np.random.default_rng(i), 4, held_out=True)
        loose += sum(map(held_out_caption, free))
    assert found == 0
    assert loose > 0


def test_aligned_embeddings_lose_less(
    objective: ClipObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures beside their own captions: nearly no loss, every pick right; beside their
    neighbours': a large one, every pick wrong."""
    batch = {"pictures": torch.zeros(3, 1), "tokens": torch.zeros(3, 2, 1, dtype=torch.long)}
    axes = torch.eye(4)
    with torch.no_grad():
        objective.clip.logit_scale.fill_(4.0)
    results = []
    for turned in (0, 1):
        pictures = axes[:3].roll(turned, dims=0)
        texts = torch.stack([axes[:3], axes[3:].expand(3, 4)], dim=1).flatten(0, 1)
        monkeypatch.setattr(objective, "see", lambda _, p=pictures: (p, p))
        monkeypatch.setattr(objective, "read", lambda _, t=texts: t)
        with torch.no_grad():
            results.append({name: float(value) for name, value in objective(batch).items()})
    aligned, misaligned = results
    s = torch.tensor(4.0).exp().item()
    # Cross-entropy with one logit s among 6 and among 3, the others 0; then with it at another.
    spread = (np.log1p(5 * np.exp(-s)) + np.log1p(2 * np.exp(-s))) / 2
    assert aligned["loss"] == pytest.approx(spread, abs=1e-6)  # float32 near 0
    assert misaligned["loss"] == pytest.approx(s + spread, rel=1e-5)
    assert aligned["picks_caption"] == aligned["beats_hard"] == 1.0
    assert misaligned["picks_caption"] == 0.0


def test_padding_changes_no_embedding(clip_objective: ClipObjective) -> None:
    """Only the tokens up to the longest caption are read: the same as reading all."""
    tokens = clip_objective.batch(range(3))["tokens"][:, 0]
    with torch.no_grad():
        short = clip_objective.read(tokens)
        full = clip_objective.clip.get_text_features(input_ids=tokens).pooler_output
    # The same sums over other lengths: float32 rounding.
    assert torch.allclose(short, torch.nn.functional.normalize(full, dim=-1), atol=1e-5)


def test_the_export_is_stock(text_folder: Path, clip_objective: ClipObjective) -> None:
    """Both towers and the text encoder alone answer as the objective does."""
    encoder = CLIPTextModel.from_pretrained(text_folder / "text_encoder")
    clip = CLIPModel.from_pretrained(text_folder / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    ids = tokenizer(["a red star", "two blue fish"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        wanted = clip_objective.clip.get_text_features(input_ids=ids.input_ids)
        again = clip.get_text_features(input_ids=ids.input_ids)
        alone = encoder(ids.input_ids)
    # Another attention kernel after loading: float32 rounding.
    assert torch.allclose(again.pooler_output, wanted.pooler_output, atol=1e-5)
    assert torch.allclose(alone.last_hidden_state, wanted.last_hidden_state, atol=1e-5)


def test_a_run_begins_from_what_another_left(
    text_folder: Path,
    clip_objective: ClipObjective,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the folder that a run exports, and from the model in it; messages name the setting."""
    monkeypatch.setattr(clip, "World", SmallWorld)
    config = clip_objective.config
    wanted = clip_objective.clip.state_dict()
    run = config.run.model_copy(update={"seed": config.run.seed + 1})
    for folder in (text_folder, text_folder / "clip"):
        begun = ClipObjective(config.model_copy(update={"run": run, "begin_from": folder}))
        found = begun.clip.state_dict()
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    for setting in ("text", "begin_from"):
        with pytest.raises(UserError, match=f"^{setting}: {tmp_path} has no tokenizer"):
            ClipObjective(config.model_copy(update={setting: tmp_path}))
        with pytest.raises(UserError, match=f"^{setting}={tmp_path / 'none'} is no folder"):
            ClipObjective(config.model_copy(update={setting: tmp_path / "none"}))
    clip_objective.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for setting, place in (("text", tmp_path / "text_encoder"), ("begin_from", tmp_path)):
        with pytest.raises(UserError, match=f"^{setting}: {place} holds none of"):
            ClipObjective(config.model_copy(update={setting: tmp_path}))


@pytest.mark.parametrize("setting", ["begin_from", "text"])
def test_another_world_is_told_in_the_words_that_the_towers_know(
    setting: str, text_folder: Path, clip_objective: ClipObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer of another world's captions would give the embeddings other meanings."""
    monkeypatch.setattr(clip, "World", SmallWorld)
    data = clip_objective.config.data.model_copy(update={"seed": 5})
    config = clip_objective.config.model_copy(update={"data": data})
    words = clip_objective.tokenizer.get_vocab()
    assert ClipObjective(config).tokenizer.get_vocab() != words
    begun = ClipObjective(config.model_copy(update={setting: text_folder}))
    assert begun.tokenizer.get_vocab() == words


def test_a_text_encoder_goes_before_the_text_tower_that_a_run_left(
    text_folder: Path,
    clip_objective: ClipObjective,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the pictures of one run and the words of another begin a third."""
    monkeypatch.setattr(clip, "World", SmallWorld)
    encoder = CLIPTextModel.from_pretrained(text_folder / "text_encoder")
    other = encoder.state_dict()
    with torch.no_grad():
        for weight in other.values():
            weight.mul_(2.0)
    encoder.save_pretrained(tmp_path / "text_encoder")
    clip_objective.tokenizer.save_pretrained(tmp_path / "tokenizer")
    both = {"begin_from": text_folder, "text": tmp_path}
    begun = ClipObjective(clip_objective.config.model_copy(update=both)).clip.state_dict()
    first = clip_objective.clip.state_dict()
    for name, weight in begun.items():
        wanted = first[name] * 2 if name.startswith("text_model.") else first[name]
        assert torch.equal(weight, wanted), name


def test_eight_pairs_are_learnt(objective: ClipObjective) -> None:
    losses = laws.losses_of_one_batch(objective, n=8, lr=1e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_one_head_reads_both_towers(
    clip_objective: ClipObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a vector says of where things are teaches the tower that it is of, and no other."""
    monkeypatch.setattr(clip, "World", SmallWorld)
    told = ClipObjective(clip_objective.config.model_copy(update={"vectors_weight": 0.5}))
    laws.everything_trained_has_a_gradient(told)
    batch = told.batch(range(8))
    plain = clip_objective(batch)
    losses = told(batch)
    towers = {
        "picture_where": told.clip.visual_projection.weight,
        "caption_where": told.clip.text_projection.weight,
    }
    for name in towers:
        graph = torch.autograd.grad(
            losses[name], list(towers.values()), retain_graph=True, allow_unused=True
        )
        taught = [g is not None and bool(g.any()) for g in graph]
        assert taught == [name == other for other in towers]
    added = 0.5 * (losses["picture_where"] + losses["caption_where"])
    assert torch.allclose(losses["loss"], plain["loss"] + added)


def test_turned_relations_are_beaten_by_who_knows_order(
    objective: ClipObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Towers that hold what a caption says of order win every time, towers that hold its reverse
    never."""
    monkeypatch.setattr(clip, "World", SmallWorld)
    monkeypatch.setattr(objective, "see", lambda pictures: (torch.ones(len(pictures), 1), None))
    for first, share in ((1.0, 1.0), (-1.0, 0.0)):
        turned = torch.tensor([[first], [-first]]).repeat(256, 1)
        monkeypatch.setattr(objective, "read", lambda _, t=turned: t)
        world = World(0, "test")
        assert float(objective._beats_turned(world, torch.device("cpu"))) == share
