"""Every command of the installed package, on data of seconds; what each writes is checked.

    cd "$(mktemp -d)" && python -I .../tests/smoke.py    # -I: nothing but what is installed

Ends with an error where a command of `ssl_flow.cli` has no run here. What needs an extra that is
not installed has to be refused with the extra's name.
"""

import contextlib
import io
import json
import os
import subprocess
import sysconfig
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch

import ssl_flow
from ssl_flow.cli import _COMMANDS, main
from ssl_flow.config import preset_files
from ssl_flow.evaluation.protocols import PROTOCOLS
from ssl_flow.flow import FlowStore
from ssl_flow.models.export import FORMATS

RNG = np.random.default_rng(0)
TINY = ["--model.backbone", "test_resnet", "--train.steps", "3", "--train.batch-size", "4",
        "--train.log-every", "1", "--data.workers", "0", "--device", "cpu"]  # fmt: skip
QUICK = {  # protocol -> settings
    "linear-probe": "steps=20",
    "linear-probe-bn": "steps=2 warmup_steps=1 batch_images=2 input_size=64 stride=48",
    "linear-probe-plain": "epochs=2 drop_epoch=1 batch_images=4 input_size=64",
    "dense-knn": "image_size=64",
    "clustering": "image_size=64 runs=1 overclusters=6",
    "fine-tune": "steps=2 crop=64",
    "label-propagation": "short_side=64",
    "classification": "resize=64 crop=64",
}


def run(*words, needs=()):
    """What `ssl-flow WORDS` prints; without the modules it `needs`, that it is refused, and ''."""
    program = Path(sysconfig.get_path("scripts")) / "ssl-flow"
    start = time.perf_counter()
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    print(f"{time.perf_counter() - start:6.1f} s  ssl-flow {' '.join(words)[:90]}", flush=True)
    missing = [name for name in needs if find_spec(name) is None]
    expected = 2 if missing else 0
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == expected, f"exit status {done.returncode}, not {expected}:\n{said}"
    assert not missing or "ssl-flow[" in done.stderr, f"no word of an extra for {missing}:\n{said}"
    return "" if missing else done.stdout


def holds(folder, *names):
    for name in names:
        assert (Path(folder) / name).stat().st_size > 0, f"{folder}/{name} is empty"


def write_data():
    """Two videos, and the smallest of each kind of labelled data, beside each other."""
    for folder in ("videos", "labelled/images", "labelled/masks", "pairs/one", "map/layers"):
        Path(folder).mkdir(parents=True)
    for name in ("a", "b"):  # a picture that moves 2 pixels right and 1 down a frame
        noise = RNG.integers(0, 256, (96, 160, 3)).astype(np.float32)
        picture = (cv2.GaussianBlur(noise, (0, 0), 2.5) - 128) * 6 + 128
        picture = picture.clip(0, 255).astype(np.uint8)
        video = cv2.VideoWriter(f"videos/{name}.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
        for i in range(12):
            video.write(picture[20 - i : 84 - i, 40 - 2 * i : 136 - 2 * i])
        video.release()
    for i in range(10):
        image, mask = scene()
        cv2.imwrite(f"labelled/images/{i}.png", image)
        cv2.imwrite(f"labelled/masks/{i}.png", mask)
        for kind, part in (("frames", image), ("masks", mask)):
            Path(f"sequences/{kind}/{i // 4}").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(f"sequences/{kind}/{i // 4}/{i}.png", part)
        folder = Path(f"classes/{('train', 'val')[i % 2]}/{('dark', 'light')[i // 2 % 2]}")
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{i}.png"), image // (2 - i // 2 % 2))
    for name in ("frame10", "frame11"):
        cv2.imwrite(f"pairs/one/{name}.png", image)
    still = np.full((64, 64, 3), 32768, np.uint16) * np.array([0, 1, 1], np.uint16)
    cv2.imwrite("pairs/one/flow10.png", still + np.array([1, 0, 0], np.uint16))
    kind = cv2.GaussianBlur(RNG.normal(size=(320, 320)), (0, 0), 20) > 0
    x = np.arange(320)
    forest, path = np.where(kind, x % 8 < 4, x[:, None] % 8 < 2), RNG.random((320, 320)) < 0.02
    for name, layer in (("forest", forest), ("path", path)):
        cv2.imwrite(f"map/layers/{name}.png", layer * np.uint8(255))
    cv2.imwrite("map/cover.png", kind + np.uint8(1))
    meta = {"projection": "equirectangular (EPSG:4326)", "pixels_per_degree": 200, "lon_left": 10,
            "lat_top": 0.8, "layers": ["forest", "path"],
            "labels": {"cover.png": {"1": "thin", "2": "dense"}}}  # fmt: skip
    Path("map/meta.json").write_text(json.dumps(meta))
    Path("places.csv").write_text("lon,lat\n10.5,0.1\n10.8,-0.2\n11.1,0.3\n")


def scene():
    """A bright square on noise, (64, 64, 3), and its mask of 0 and 1."""
    mask = np.zeros((64, 64), np.uint8)
    x, y = RNG.integers(0, 40, 2)
    mask[y : y + 24, x : x + 24] = 1
    return (mask[..., None] * 120 + RNG.integers(0, 90, (64, 64, 3))).astype(np.uint8), mask


def flow():
    for name in ("a", "b"):
        store = f"store_{name}"
        run("flow", f"videos/{name}.avi", "--out", store, "--size", "64", "--workers", "1")
        sample = FlowStore(store)[0]
        moved = np.median(sample.flow[sample.valid], axis=0)
        assert np.abs(moved - (2, 1)).max() < 0.2, f"flow {moved} of a motion of (2, 1)"


def merge_flow():
    run("merge-flow", "store_a", "store_b", "--out", "store")
    parts = [len(FlowStore(f"store_{name}")) for name in ("a", "b")]
    assert len(FlowStore("store")) == sum(parts) > 0


def show_flow():
    run("show", "flow", "store", "--out", "sheet.png")
    assert cv2.imread("sheet.png").std() > 0


def train():
    printed = run("train", "small", "--data.store", "store", "--data.crop", "64", *TINY)
    (folder,) = Path("runs").iterdir()
    assert f"encoder: {folder / 'encoder'}" in printed
    holds(folder, "config.yaml", "results.json", "report.html", "encoder/model.safetensors")
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert len(losses) == 3 and np.isfinite(losses).all()
    folder.rename("run")
    encoder = ssl_flow.load_encoder("run")
    images = encoder.normalize(torch.zeros((1, 64, 64, 3), dtype=torch.uint8))
    assert encoder.embed(images).shape == (1, 16, 16, 16)


def show_run():
    for name in ("run/report.html", "run/pictures/curves.png"):
        Path(name).unlink()
    run("show", "run", "run")
    holds("run", "report.html", "pictures/curves.png")


def show_embedding():
    run("show", "embedding", "videos/a.avi", "--encoder", "run", "--size", "64", "--groups", "2",
        "--out", "embedding.png", needs=["sklearn"])  # fmt: skip
    run("show", "embedding", "videos/a.avi", "--encoder", "run", "--size", "64", "--groups", "0",
        "--out", "embedding.mp4")  # fmt: skip
    assert cv2.VideoCapture("embedding.mp4").read()[0]


def show_heatmap():
    for method, needs in (("similarity", []), ("grad-cam", ["captum"])):
        words = ["--encoder", "run", "--at", "30,20", "--method", method, "--out", f"{method}.png"]
        if run("show", "heatmap", "labelled/images/0.png", *words, needs=needs):
            assert cv2.imread(f"{method}.png").shape == (64, 64, 3)
            assert np.load(f"{method}.npy").shape == (64, 64)


def evaluate():
    names = [name for name in PROTOCOLS if name != "loc2vec"]
    if any(find_spec(name) is None for name in ("sklearn", "scipy")):
        names.remove("clustering")
    data = ["folder:labelled", "davis2016:sequences", "imagefolder:classes", "middlebury:pairs"]
    settings = [f"{name}.{one}" for name in names for one in QUICK.get(name, "").split()]
    run("eval", "suite", "--encoders", "ours=run", "random:test_resnet", "--data", *data,
        "--protocols", *names, "--set", *settings, "--out", "scores",
        "--device", "cpu")  # fmt: skip
    judged("scores", names, ["ours", "random:test_resnet"])
    printed = run("eval", "dense-knn", "--encoder", "handmade", "--data", "folder:labelled",
                  "--out", "knn", "--image-size", "64", "--device", "cpu", "--json")  # fmt: skip
    judged("knn", ["dense-knn"], ["handmade"])
    assert json.loads(printed) == json.loads(Path("knn/results.json").read_text())


def judged(folder, protocols, encoders):
    holds(folder, "report.html", "results.csv", "results.md")
    tables = json.loads((Path(folder) / "results.json").read_text())["tables"]
    assert sorted(table["protocol"]["name"] for table in tables) == sorted(protocols)
    for table in tables:
        assert [row["encoder"] for row in table["rows"]] == encoders
        for row in table["rows"]:
            assert np.isfinite(next(iter(row["scores"].values()))["value"]), row


def export():
    for to in FORMATS:
        needs = ("onnx", "onnxruntime", "onnxscript") if to == "onnx" else ()
        encoder = "random:resnet18" if to == "torchvision" else "run"
        if run("export", encoder, "--to", to, f"exported/{to}", needs=needs):
            holds(f"exported/{to}", "README.md", "config.json", "model.safetensors")
            ssl_flow.load_encoder(f"exported/{to}")
    holds("exported/torch-export", "model.pt2")


def rasterize():
    corners = [(9.502, 47.102), (9.508, 47.102), (9.508, 47.108), (9.502, 47.108)]
    nodes = [f'<node id="{i + 1}" version="1" lon="{x}" lat="{y}"/>'
             for i, (x, y) in enumerate(corners)]  # fmt: skip
    way = "".join(f'<nd ref="{i}"/>' for i in (1, 2, 3, 4, 1)) + '<tag k="natural" v="wood"/>'
    Path("village.osm").write_text(
        '<osm version="0.6"><bounds minlon="9.5" minlat="47.1" maxlon="9.51" maxlat="47.11"/>'
        f'{"".join(nodes)}<way id="1" version="1">{way}</way></osm>'
    )
    if run("loc2vec", "rasterize", "village.osm", "--out", "village", needs=["osmium"]):
        holds("village", "meta.json")
        assert any(cv2.imread(str(file)).any() for file in Path("village/layers").rglob("*.png"))


def embed():
    run("train", "loc2vec", "--data.store", "map:map", "--data.metres", "9000",
        "--out", "tile_runs", *TINY, "--model.backbone", "tile_cnn")  # fmt: skip
    next(Path("tile_runs").iterdir()).rename("tile_run")
    run("loc2vec", "embed", "--lonlat", "places.csv", "--map", "map", "--encoder", "tile_run",
        "--out", "vectors.csv", "--device", "cpu")  # fmt: skip
    vectors = np.loadtxt("vectors.csv", delimiter=",", skiprows=1)
    assert vectors.shape == (3, 2 + 16) and np.isfinite(vectors).all()
    run("eval", "loc2vec", "--encoders", "ours=tile_run", "histograms", "--data", "map:map",
        "--metres", "9000", "--pixels", "32", "--train-tiles", "100", "--test-tiles", "40",
        "--out", "places", "--device", "cpu", needs=["sklearn"])  # fmt: skip
    if find_spec("sklearn"):
        judged("places", ["loc2vec"], ["ours", "histograms"])


def neighbours():
    printed = run("loc2vec", "neighbours", "--vectors", "vectors.csv", "--row", "1").splitlines()
    assert len(printed) == 4 and printed[1].startswith("1,10.8,-0.2,0"), printed


STEPS = {  # in the order in which one needs what another wrote
    "flow": flow, "merge-flow": merge_flow, "show flow": show_flow, "train": train,
    "show run": show_run, "show embedding": show_embedding, "show heatmap": show_heatmap,
    "eval": evaluate, "export": export, "loc2vec rasterize": rasterize, "loc2vec embed": embed,
    "loc2vec neighbours": neighbours,
}  # fmt: skip


def helps():
    protocols = [f"eval {name}" for name in ("suite", *PROTOCOLS)]
    presets = [f"train {name}" for name in preset_files()]
    assert "train quickstart" in presets, "the presets are not in the package"
    for command in (*_COMMANDS, *protocols, *presets):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        assert f"usage: ssl-flow {command.split()[0]}" in printed.getvalue(), command
        assert "docs/" not in printed.getvalue(), f"{command} names a file that no wheel has"


if __name__ == "__main__":
    for name in ("PYTHONPATH", "TRITON_INTERPRET"):
        os.environ.pop(name, None)
    code = Path(ssl_flow.__file__)
    assert code.is_relative_to(sysconfig.get_path("purelib")), f"{code} is not the installed one"
    assert not any(Path.cwd().iterdir()), "run it in an empty folder"
    without = sorted(set(_COMMANDS) - set(STEPS))
    assert not without, f"no run here of {', '.join(without)}: add one to STEPS"
    assert run("--version").strip() == version("ssl-flow") == ssl_flow.__version__
    listed = run("--help")
    assert all(name in listed for name in _COMMANDS)
    helps()
    write_data()
    for name, step in STEPS.items():
        if name in _COMMANDS:
            step()
    print(f"smoke test: all {len(_COMMANDS)} commands, {code.parent}")
