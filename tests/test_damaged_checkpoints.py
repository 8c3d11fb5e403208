"""Whatever is in a checkpoint's files, a run resumes from it, or refuses it in one line and has changed nothing."""

import copy
import hashlib
import json
import resource
import struct

import pytest
import torch
from conftest import learnable_corpus, spawn, tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitrain import PackedData, UserError, train
from minitrain.checkpoint import Checkpointer
from minitrain.models import build_model
from minitrain.optim import adamw
from minitrain.parallel.mesh import ALONE
from minitrain.parallel.zero import shard_optimizer
from minitrain.train import set_weights

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
ODD = st.sampled_from([
    -1, 0, 1, 2**31, 2**53 + 1, 2**62 - 1, 2**63, 2**64, 10**30, -(2**63), 1.5, 1e308, float("nan"), True, None, "",
    "\n", "a\0b", "../rank-00000.safetensors", "/etc/passwd", "rank-00001.safetensors", "F64", "U8", "BOOL", "F8_E5M2",
    [], {}, [[[]]], [2**61, 2**61, 0],
])  # fmt: skip


class Target:
    """A run that resumes from its folder again and again, and what it holds."""

    def __init__(self, cfg):
        self.cfg = cfg
        model = build_model(cfg.model)
        fill = set_weights(model, cfg, ALONE)
        self.opt = shard_optimizer(model, adamw(cfg.optim), ALONE, cfg.parallel, fill)
        self.data = PackedData(cfg.data, ALONE, 101)
        self.ckpt = Checkpointer(cfg, self.opt, self.data, ALONE)

    def held(self):
        """Bits of all weights and state, the random generator's, and the place in the data."""
        pieces = {name: piece.values.clone() for name, piece in self.opt.pieces().items()}
        return pieces | {"rng": torch.get_rng_state()}, copy.deepcopy(self.data.state())

    def resume(self):
        """-> whether it did; if it refused, it has changed nothing."""
        tensors, place = self.held()
        try:
            self.ckpt.resume()
            next(self.data)
        except UserError as error:
            assert "\n" not in str(error)
            now, place_now = self.held()
            assert place_now == place and now.keys() == tensors.keys()
            assert all(torch.equal(now[name], values) for name, values in tensors.items())
            return False
        self.__init__(self.cfg)
        return True


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    corpus = learnable_corpus(folder / "corpus")
    cfg = tiny_run(
        corpus, folder / "run", train={"steps": 4}, data={"rows_per_step": 2}, parallel={"zero": 1},
        checkpoint={"export": False},
    )  # fmt: skip
    spawn(2, train, cfg)  # so that there are two files, and tensors in both
    return Target(cfg)


@st.composite
def changes(draw):
    """What is done to a value of JSON: a function of it."""

    def any_place(value):
        depth, here = draw(st.integers(1, 5)), (value, None)
        while depth and isinstance(value, dict | list) and value:
            key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
            here, value, depth = (value, key), value[key], depth - 1
        return here

    def change(value):
        container, key = any_place(value)
        act = draw(st.sampled_from(["replace", "replace", "odd", "odd", "delete", "copy", "rename", "swap", "wrap"]))
        if act == "replace":
            container[key] = draw(JSON)
        elif act == "odd":
            container[key] = copy.deepcopy(draw(ODD))
        elif act == "delete":
            del container[key]
        elif act == "swap":
            other, at = any_place(value)
            container[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(container[key])
        elif act == "wrap":
            container[key] = [container[key]]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            inner = copy.deepcopy(container[key]) if act == "copy" else container.pop(key)
            container[draw(st.text(max_size=5) | st.sampled_from(["../rank-00000.safetensors", *value]))] = inner

    return change


def sealed(manifest):
    """Its text, with the right checksum."""
    body = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, indent=2).removesuffix("\n}")
    return f'{body},\n  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def cut(draw, content):
    """Bytes cut off, left out, doubled, or in another place."""
    a, b = sorted([draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))])
    return draw(
        st.sampled_from([content[:a], content[:a] + content[b:], content[:b] + content[a:], content[a:] + content[:a]])
    )


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_checkpoint_is_resumed_or_refused_in_one_line_with_nothing_changed(target, data):
    """Manifest and headers changed as JSON or as bytes, files swapped, with checksums wrong or made right again."""
    draw = data.draw
    folder = target.ckpt.find()[-1]
    kept = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest, new = json.loads(kept["manifest.json"]), dict(kept)
    ranks = [name for name in kept if name.startswith("rank-")]
    file = draw(st.sampled_from(ranks))
    size = 8 + struct.unpack("<Q", kept[file][:8])[0]
    header = json.loads(kept[file][8:size])
    what = draw(st.sampled_from(["manifest", "manifest", "header", "both", "bytes", "files"]))
    if what in ("header", "both"):
        draw(changes())(header)
        text = json.dumps(header).encode()
        length = draw(st.sampled_from([len(text)] * 8 + [0, len(text) - 1, len(text) + 1, 1 << 40, (1 << 64) - 1]))
        new[file] = struct.pack("<Q", length) + text + kept[file][size:]
        size = 8 + len(text)
    if what == "files":
        other = draw(st.sampled_from(list(kept)))
        new[file], new[other] = new[other], new[file]
    if draw(st.booleans()):
        about = {"bytes": len(new[file]), "header_bytes": size}
        manifest["files"][file] = about | {"header_sha256": hashlib.sha256(new[file][:size]).hexdigest()}
    if what in ("manifest", "both"):
        for change in draw(st.lists(changes(), min_size=1, max_size=2)):
            if manifest:
                change(manifest)
    if what != "files":
        is_sealed = draw(st.sampled_from([True, True, True, False]))
        new["manifest.json"] = sealed(manifest) if is_sealed else json.dumps(manifest, indent=2).encode()
    if what == "bytes":
        name = draw(st.sampled_from(list(kept)))
        new[name] = cut(draw, new[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for name, content in new.items():
            (folder / name).write_bytes(content)
        target.resume()
    finally:
        for name, content in kept.items():
            (folder / name).write_bytes(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
