"""An encoder in your own code: one labelled image segments another, by similarity alone.

    python examples/use_encoder.py                             # two frames of a synthetic video
    python examples/use_encoder.py --encoder runs/NAME \\
        --labelled FIRST.jpg --mask FIRST.png --image SECOND.jpg
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import ssl_flow
from ssl_flow.data.synthetic import SyntheticVideo
from ssl_flow.evaluation.pictures import palette, strip

parser = argparse.ArgumentParser(description="Segment an image with the mask of another one.")
parser.add_argument("--encoder", default="handmade", help="runs/NAME, timm:NAME, random:NAME, ...")
parser.add_argument("--labelled", type=Path, help="an image (none: synthetic), ...")
parser.add_argument("--mask", type=Path, help="... its classes as grey values or palette indices")
parser.add_argument("--image", type=Path, help="the image to segment, of the same size")
parser.add_argument("--out", type=Path, default=Path("segmented.png"))
args = parser.parse_args()

if args.labelled:
    images = np.stack([np.array(Image.open(p).convert("RGB")) for p in (args.labelled, args.image)])
    mask, truth = np.array(Image.open(args.mask)), None
else:
    video = SyntheticVideo(seed=3)
    images = np.stack([video.frame(0), video.frame(8)])  # (2, H, W, 3) uint8 RGB
    mask, truth = video.mask(0), video.mask(8)  # (H, W) class indices

encoder = ssl_flow.load_encoder(args.encoder)  # in evaluation mode; `.to("cuda")` as any module
with torch.no_grad():
    x = encoder.normalize(torch.from_numpy(images))  # (2, 3, H, W), as this encoder expects
    for stride, level in zip(encoder.strides, encoder.features(x), strict=True):
        print(f"stride {stride}: {tuple(level.shape)}")
    maps = encoder.hypercolumn(x)  # (2, sum of channels, H/4, W/4)
    if encoder.head is not None:  # what ssl_flow has trained also embeds each pixel
        maps = encoder.embed(x)  # (2, D, H/4, W/4), unit length

rows, columns = maps.shape[-2:]
first, second = F.normalize(maps, dim=1).flatten(2)  # (C, N) each
small = cv2.resize(mask, (columns, rows), interpolation=cv2.INTER_NEAREST)
votes = F.one_hot(torch.from_numpy(small).long().flatten()).float()  # (N, classes)
near, where = (second.T @ first).topk(5)  # the five most similar pixels of each
score = ((near / 0.1).softmax(1)[..., None] * votes[where]).sum(1)  # (N, classes)
score = score.T.reshape(1, -1, rows, columns)
found = F.interpolate(score, mask.shape, mode="bilinear")[0].argmax(0).numpy()

if truth is not None:
    print(f"pixel accuracy {(found == truth).mean():.3f}, all background {(truth == 0).mean():.3f}")
colors = palette(int(mask.max()) + 1)
sheet = strip([images[0], colors[mask], images[1], colors[found]], mask.shape)
Image.fromarray(sheet).save(args.out)
print(f"image, its mask, second image, what was found: {args.out}")
