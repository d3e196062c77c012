"""Checkpoints: complete or absent, damaged ones set aside, old ones removed, disk space checked in advance."""

import errno
import json
import logging
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import luthier.training.checkpoints as checkpoints
from luthier.errors import UserError
from luthier.files import atomic_write
from luthier.training.checkpoints import (
    HASHES,
    ORIGIN,
    Origin,
    bring_best,
    check_named,
    check_origin,
    checkpoints_by_step,
    find_damage,
    lacking_space,
    newest_shared,
    newest_whole,
    prune_checkpoints,
    seal,
    write_origin,
)
from luthier.training.trainer import _load_best


def write_checkpoint(output_dir, step):
    partial = output_dir / ".partial" / f"checkpoint-{step}"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(bytes(range(256)) * step)
    (partial / "trainer_state.json").write_text("{}")
    seal(partial, output_dir / f"checkpoint-{step}")
    return output_dir / f"checkpoint-{step}"


def test_sealed_checkpoint_is_whole(tmp_path):
    folder = write_checkpoint(tmp_path, 4)
    assert find_damage(folder) is None and newest_whole(tmp_path) == folder
    assert set(json.loads((folder / HASHES).read_text())) == {"model.safetensors", "trainer_state.json"}
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
            "not as it was",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / HASHES).unlink(), "hashes.json is missing"),
        (lambda f: (f / HASHES).write_text("{"), "cannot be read"),
        (lambda f: (f / HASHES).write_text("[]"), "cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                bytes([(f / "model.safetensors").read_bytes()[0] ^ 1]) + (f / "model.safetensors").read_bytes()[1:]
            ),
            "model.safetensors is not as it was written",
        ),
    ],
)
def test_damaged_checkpoint_is_set_aside_and_the_previous_one_is_used(tmp_path, caplog, damage, message):
    before, newest = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 8)
    damage(newest)
    assert message in find_damage(newest)
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path) == before
    assert "Not used" in caplog.text and message in caplog.text
    assert (tmp_path / "damaged-checkpoint-8").exists() and not newest.exists()


def test_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    before, newest = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 8)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoints, "_hash", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"checkpoint-8/.+ cannot be read \(Permission denied\): check its owner"):
        newest_whole(tmp_path)
    assert before.exists() and newest.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_weights_have_the_rights_of_the_other_files(tmp_path):
    partial = tmp_path / "partial"
    partial.mkdir()
    save_file({"weight": torch.zeros(2)}, partial / "model.safetensors")
    (partial / "trainer_state.json").write_text("{}")
    (partial / "trainer_state.json").chmod(0o640)
    seal(partial, tmp_path / "checkpoint-1")
    assert stat.S_IMODE((tmp_path / "checkpoint-1/model.safetensors").stat().st_mode) == 0o640


def test_partly_written_checkpoint_is_removed(tmp_path):
    (tmp_path / ".partial/checkpoint-9").mkdir(parents=True)
    assert newest_whole(tmp_path) is None and not (tmp_path / ".partial").exists()


def test_oldest_checkpoints_are_removed_except_the_best(tmp_path):
    for step in (2, 4, 10, 12):
        write_checkpoint(tmp_path, step)
    prune_checkpoints(tmp_path, None, best=2)
    assert list(checkpoints_by_step(tmp_path)) == [12, 10, 4, 2]
    prune_checkpoints(tmp_path, 2, best=2)
    assert list(checkpoints_by_step(tmp_path)) == [12, 10, 2]


def test_too_little_disk_space_is_foreseen(tmp_path):
    assert lacking_space(tmp_path, 1000, 2) == ""
    assert "MB left, and this run's checkpoints need up to 4,000,000,000 MB" in lacking_space(tmp_path, 10**15, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"recipe": "the recipe head"},
            "was trained with the recipe full, and now there would be the recipe head: give",
        ),
        ({"processes": 2}, "was trained by 4 processes, each with a part of the stream, and now there would be 2"),
        ({"own_batch": 16}, "was trained with batches of 8 images in a process, by which the order .* would be 16"),
        ({"data": "b"}, "may have learned from images that are tested now"),
        ({"order": "b"}, "is of other images or files"),
        ({"batch": 64}, "was trained with 32 images in a step, and now there would be 64"),
        (
            {"settings": "images of 96 x 96 px"},
            "rate of 0.002, and now there would be images of 96 x 96 px: give",
        ),
    ],
)
def test_checkpoint_of_other_data_is_refused(tmp_path, changed, message):
    origin = Origin("a", 32, "a", "images of 192 x 192 px and a learning rate of 0.002", "the recipe full", 4, 8)
    with pytest.raises(UserError, match="does not say which images it has learned from"):
        check_origin(tmp_path, origin)  # of another program
    (tmp_path / ORIGIN).write_text(json.dumps(origin._asdict() | {"colour": "red"}))
    with pytest.raises(UserError, match="is of another version of Luthier: begin a new run in another --output_dir"):
        check_origin(tmp_path, origin)
    write_origin(tmp_path, origin)
    check_origin(tmp_path, origin)
    with pytest.raises(UserError, match=message):
        check_origin(tmp_path, origin._replace(**changed))


def test_best_checkpoint_comes_along_into_another_directory(tmp_path):
    best, named = (write_checkpoint(tmp_path / "one", step) for step in (4, 8))
    (named / "trainer_state.json").write_text('{"best_global_step": 4}')
    (tmp_path / "other").mkdir()
    bring_best(named, tmp_path / "other")
    assert newest_whole(tmp_path / "other") == tmp_path / "other/checkpoint-4"
    bring_best(named, tmp_path / "one")
    (named / "trainer_state.json").write_text('{"best_global_step": null}')
    bring_best(named, tmp_path / "other")
    assert find_damage(best) is None and list(checkpoints_by_step(tmp_path / "other")) == [4]


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for content in (b"before", b"after"):
        partial = tmp_path / ".partial/checkpoint-4"
        partial.mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(content)
        (partial / "trainer_state.json").write_text("{}")
        seal(partial, tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4/model.safetensors").read_bytes() == b"after"
    assert find_damage(tmp_path / "checkpoint-4") is None and not partial.exists()


@pytest.fixture
def events(monkeypatch) -> list:
    """What is synced to the disk, each by its inode, and in between what gets its name."""
    happened, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(Path, "replace", lambda self, target: happened.append("renamed") or replace(self, target))
    return happened


@pytest.mark.skipif(os.name != "posix", reason="other systems open no folders")
def test_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, events):
    """After a power failure the name must not stand for empty files."""
    folder = write_checkpoint(tmp_path, 4)
    named = events.index("renamed")
    assert {*events[:named]} == {path.stat().st_ino for path in (folder, *folder.iterdir())}
    assert events[named + 1 :] == [tmp_path.stat().st_ino], "and so is the name, before older ones are removed"


def test_file_is_on_the_disk_before_it_gets_its_name(tmp_path, events):
    with atomic_write(tmp_path / "a.txt") as whole:
        whole.write_text("a")
    assert events == [(tmp_path / "a.txt").stat().st_ino, "renamed"]


@pytest.mark.parametrize("missing", ["trainer_state.json", HASHES])
def test_checkpoint_that_is_not_whole_on_another_machine_is_refused(tmp_path, monkeypatch, missing):
    """The library would go on without the files of the optimizer, and end with other weights."""
    folder = write_checkpoint(tmp_path, 4)
    monkeypatch.setattr(checkpoints, "from_main_process", lambda _: folder)
    assert newest_shared(tmp_path, is_main_process=False) == folder
    (folder / missing).unlink()
    with pytest.raises(UserError, match="checkpoint-4 is not on this machine"):
        newest_shared(tmp_path, is_main_process=False)


def test_checkpoints_that_are_there_make_room(tmp_path, monkeypatch):
    size = sum(file.stat().st_size for file in write_checkpoint(tmp_path, 2).iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size))
    assert lacking_space(tmp_path, size, 1) == "", "three are needed, and one is there"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size - 1))
    assert "MB left" in lacking_space(tmp_path, size, 1)


def test_copies_and_files_are_no_checkpoints(tmp_path):
    folder = write_checkpoint(tmp_path, 4)
    shutil.copytree(folder, tmp_path / "checkpoint-12-copy")
    (tmp_path / "checkpoint-9").touch()
    (tmp_path / "checkpoint-new").mkdir()
    assert checkpoints_by_step(tmp_path) == {4: folder} and newest_whole(tmp_path) == folder
    prune_checkpoints(tmp_path, 1, best=None)
    assert (tmp_path / "checkpoint-12-copy").exists()


def test_named_checkpoint_that_is_damaged_is_refused(tmp_path):
    origin, folder = Origin("a", 32), write_checkpoint(tmp_path, 4)
    write_origin(folder, origin)
    check_named(folder, origin)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged: model.safetensors is not as it was written. Use another"):
        check_named(folder, origin)
    (folder / HASHES).unlink()  # nothing says what it was
    check_named(folder, origin)
    with pytest.raises(UserError, match="of other images or files"):
        check_named(folder, origin._replace(data="b"))


def test_best_checkpoint_that_is_damaged_leaves_the_last_weights(tmp_path, capsys):
    (write_checkpoint(tmp_path, 4) / "model.safetensors").write_bytes(b"")
    args = SimpleNamespace(output_dir=tmp_path, process_index=0, world_size=1)
    trainer = SimpleNamespace(model=None, args=args, state=SimpleNamespace(best_global_step=4))
    _load_best(trainer)
    assert trainer.state.best_global_step is None
    assert "is not as it was written" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("last", "is_said"), [(6, True), (4, False)])
def test_best_weights_without_a_checkpoint_are_named_unless_they_are_the_last(tmp_path, capsys, last, is_said):
    """As with `--save_strategy no`, or with `--eval_strategy steps` and a checkpoint after each epoch."""
    args = SimpleNamespace(output_dir=tmp_path, process_index=0, world_size=1)
    state = SimpleNamespace(best_global_step=4, global_step=last)
    _load_best(SimpleNamespace(model=None, args=args, state=state))
    assert state.best_global_step is None
    assert ("step 4 is the best on validation, but it has no checkpoint" in capsys.readouterr().out) is is_said


def test_best_weights_are_used_without_the_files_that_only_a_resume_needs(tmp_path, monkeypatch):
    """Somebody may have removed the state of the optimizer, because the disk was full."""
    folder, loaded = write_checkpoint(tmp_path, 4), []
    (folder / "trainer_state.json").unlink()
    monkeypatch.setattr("luthier.training.trainer.load_weights", lambda _, checkpoint: loaded.append(checkpoint))
    args = SimpleNamespace(output_dir=tmp_path, process_index=0, world_size=1)
    trainer = SimpleNamespace(model=None, args=args, state=SimpleNamespace(best_global_step=4))
    _load_best(trainer)
    assert loaded == [folder] and trainer.state.best_global_step == 4


def test_old_checkpoint_that_cannot_be_removed_does_not_end_the_training(tmp_path, monkeypatch):
    for step in (2, 4):
        write_checkpoint(tmp_path, step)

    def busy(*_, **__):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "rmdir", busy)
    prune_checkpoints(tmp_path, 1, best=None)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-4"


def test_checkpoint_of_the_same_step_stays_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 4)
    seen, rmtree = [], shutil.rmtree

    def watched(path, *rest, **options):
        seen.append(find_damage(tmp_path / "checkpoint-4") is None and path != tmp_path / "checkpoint-4")
        rmtree(path, *rest, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    write_checkpoint(tmp_path, 4)
    assert seen and all(seen)
