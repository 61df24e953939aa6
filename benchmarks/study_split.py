"""Does it hurt that the encoder has seen the scenes that the probe learns from?

    python benchmarks/study_split.py DATA random:resnet18 study/encoders/NAME ...

The probe of study_judge.py on four training sequences of DAVIS, scored on the other three, and the
other way round: foreground IoU over all images, and the mean over sequences.
"""

import sys
from pathlib import Path

import torch
from study_judge import fit, pixels, score

from ssl_flow.data.segmentation import open_segmentation
from ssl_flow.evaluation.metrics import ConfusionMatrix
from ssl_flow.evaluation.pixel_features import estimate_on
from ssl_flow.models import load_encoder

FIRST = ("blackswan", "breakdance", "camel", "dog")

torch.set_num_threads(1)
davis = open_segmentation(f"davis:{Path(sys.argv[1]) / 'davis'}", "train")
for spec in sys.argv[2:]:
    encoder = load_encoder(spec)
    if spec.startswith("random:"):
        estimate_on(encoder, davis, 64)
    encoder.eval()
    sequences = {}
    for i in range(0, len(davis), 7):
        sequences.setdefault(davis.names[i].split("/")[0], []).append(pixels(encoder, davis, i))
    for fitted in (set(FIRST), sequences.keys() - set(FIRST)):
        predict = fit([p for name in sorted(fitted) for p in sequences[name]], 2, 800, 400)
        total, single = ConfusionMatrix(2), []
        for name in sequences.keys() - fitted:
            held = score(predict, sequences[name], ConfusionMatrix(2))
            total.counts += held.counts
            single.append(float(held.iou()[1]))
        mean = sum(single) / len(single)
        print(Path(spec).name, "fitted on", *sorted(fitted), f": {total.iou()[1]:.3f} {mean:.3f}")
