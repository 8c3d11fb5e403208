"""Boxes and runs of tensors, and files of pieces made of them: any cut reads what any other wrote."""

import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_damaged_checkpoints import changes

from minitrain import pieces
from minitrain.boxes import common, numel, part_of, run_as_boxes, take, whole_box
from minitrain.config import UserError
from minitrain.pieces import Damaged, Piece, Saved, write_manifest, write_pieces

ABOUT = {"step": 1, "data": None, "config": {}, "dtype": "float32", "optimizer": "SGD", "versions": {}}


def tensor(*shape):
    return torch.arange(math.prod(shape)).view(shape)


def borders(n):
    """Where something of length n is cut."""
    return st.sets(st.integers(0, n), max_size=2).map(lambda cuts: sorted({0, n} | cuts))


@st.composite
def boxes_and_runs(draw, shape):
    """A box of a tensor, and a run of it."""
    box = tuple(range(*sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
    run = sorted(draw(st.tuples(st.integers(0, numel(box)), st.integers(0, numel(box)))))
    return box, *run


shapes = st.lists(st.integers(1, 6), max_size=3)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_and_runs(shape))))
def test_a_run_is_a_few_boxes_one_after_the_other(case):
    shape, (box, first, end) = case
    whole = tensor(*shape)
    parts = list(run_as_boxes(box, first, end))
    laid_flat = [take(whole, part).flatten() for part in parts]
    assert torch.cat([whole.new_empty(0), *laid_flat]).equal(take(whole, box).flatten()[first:end])
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_and_runs(shape), boxes_and_runs(shape))))
def test_what_two_boxes_have_in_common(case):
    shape, (a, *_), (b, *_) = case
    both = set(itertools.product(*a)) & set(itertools.product(*b))
    found = common(a, b)
    assert (set() if found is None else set(itertools.product(*found))) == both
    if found is not None:
        whole = tensor(*shape)
        assert take(take(whole, a), found, a).equal(take(whole, found))


def test_what_is_not_cut_is_whole():
    x = tensor(2, 3)
    assert part_of(x) == ((2, 3), (range(2), range(3))) and take(x, part_of(x).box).equal(x)


# ---- files


def write(folder, shape, cells):
    """cells: {box: where its runs end}, each run by another rank."""
    whole, parts = tensor(*shape), []
    folder.mkdir(parents=True, exist_ok=True)
    for box, ends in cells.items():
        values = take(whole, box).flatten()
        for first, end in itertools.pairwise(ends):
            piece = Piece(values[first:end], whole.shape, box, first)
            parts.append(write_pieces(folder / f"rank-{len(parts):05}.safetensors", {"model.x": piece}))
    write_manifest(folder, ABOUT, parts)
    return whole


@st.composite
def cuts(draw):
    """A shape, {each cell of a grid over it: where runs of it end}, and what is to be read."""
    shape = draw(shapes)
    sides = [list(itertools.starmap(range, itertools.pairwise(draw(borders(n))))) for n in shape]
    cells = {box: draw(borders(numel(box))) for box in itertools.product(*sides)}
    return shape, cells, draw(st.lists(boxes_and_runs(shape), max_size=5))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts())
def test_any_run_of_any_box_is_read_of_any_grid(tmp_path, case):
    shape, cells, reads = case
    whole = write(tmp_path, shape, cells)
    saved = Saved(tmp_path)
    saved.verify()
    assert saved.read("model.x").equal(whole.flatten())
    for box, first, end in reads:
        assert saved.read("model.x", box, first, end).equal(take(whole, box).flatten()[first:end])


FOUR = {(rows, columns): [0, 6] for rows in (range(2), range(2, 4)) for columns in (range(3), range(3, 6))}


def test_the_whole_tensor_is_no_box(tmp_path):
    write(tmp_path, (4, 6), {whole_box((4, 6)): [0, 5, 24]})
    assert '"box"' not in (tmp_path / "manifest.json").read_text()
    write(tmp_path, (4, 6), FOUR)
    assert Saved(tmp_path).manifest["tensors"]["model.x"]["pieces"][1]["box"] == [[0, 2], [3, 6]]


@pytest.fixture
def four(tmp_path):
    write(tmp_path, (4, 6), FOUR)
    return tmp_path


def unsealed(path):
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}


def seal(path, manifest):
    body = json.dumps(manifest, indent=2).removesuffix("\n}")
    path.write_text(f'{body},\n  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')


def too_high(pieces):
    """Rows 0 to 5 and then 5 to 4, of 4."""
    for i, piece in enumerate(pieces):
        rows, end = ([0, 5], 15) if i < 2 else ([5, 4], 0)
        piece.update(box=[rows, piece["box"][1]], end=end)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda p: p.pop(), "boxes of model.x are 3 of the 4 cells of its grid"),
        (lambda p: p[3].update(box=[[0, 2], [0, 3]]), "pieces of model.x overlap or leave a hole at element 6"),
        (lambda p: p[3].update(box=[[2, 4], [2, 6]]), "boxes of model.x overlap or leave a hole in dimension 1"),
        (lambda p: p[3].update(box=[[2, 5], [3, 6]]), "boxes of model.x overlap or leave a hole in dimension 0"),
        (lambda p: p[3].update(box=[[2, 3], [3, 6]], end=3), "in dimension 0"),
        (lambda p: p[3].update(box=[[4, 2], [3, 6]]), "in dimension 0"),
        (lambda p: [q.update(box=[q["box"][0], [1, 6]]) for q in p[1::2]], "in dimension 1"),
        (too_high, "in dimension 0"),
        (lambda p: p[3].pop("box"), "in dimension 0"),
        (lambda p: p[3].update(box=[[2, 4]]), r"boxes of model.x have other dimensions than its shape \[4, 6\]"),
        (lambda p: p[3].update(box=[[2, 4], [3, 6, 1]]), "too many values"),
        (lambda p: p[3].update(box=[[2, 4], [3.0, 6]]), "'float' object cannot be interpreted as an integer"),
        (lambda p: p[3].update(box=[[2, 4], [3, 1 << 70]]), "in dimension 1"),
        (lambda p: p[3].update(box=7), "not iterable"),
        (lambda p: p[3].update(end=5), "pieces of model.x end at element 5 of 6"),
        (lambda p: p[3].update(first=1), "pieces of model.x overlap or leave a hole at element 0"),
        (lambda p: p.clear(), "in dimension 0"),
    ],
)
def test_pieces_that_are_not_each_element_once_are_refused(four, change, complaint):
    manifest = unsealed(four / "manifest.json")
    seal(four / "manifest.json", manifest)
    Saved(four)
    change(manifest["tensors"]["model.x"]["pieces"])
    seal(four / "manifest.json", manifest)
    with pytest.raises(Damaged, match=complaint) as error:
        Saved(four)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_box_makes_a_traceback(four, data):
    path = four / "manifest.json"
    text = path.read_text()
    manifest = unsealed(path)
    data.draw(changes())(manifest["tensors"])
    seal(path, manifest)
    try:
        saved = Saved(four)
        saved.verify()
        for name in saved.tensors:
            saved.read(name)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        path.write_text(text)


def test_reading_takes_the_memory_of_what_is_read(tmp_path, monkeypatch):
    """Of a file of 64 MiB; pages of it that are mapped are none of the process's own."""

    def own_bytes():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    write(tmp_path, (4096, 2048), {whole_box((4096, 2048)): [0, 4096 * 2048]})
    saved, seen = Saved(tmp_path), [own_bytes()]
    monkeypatch.setattr(pieces, "take", lambda *args: (take(*args), seen.append(own_bytes()))[0])
    values = saved.read("model.x", (range(1, 4095), range(1000, 1064)))
    assert len(seen) == 3 and max(seen) - seen[0] < 4 * values.nbytes < 16 << 20
