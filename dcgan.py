# SPDX-License-Identifier: MIT
"""DCGAN in one file: learn from photos of faces to draw people who do not exist.

    python dcgan.py --data toy --epochs 3 --out out-toy     drawn faces, no download
    python dcgan.py --epochs 20                             CelebA, the lecture's faces
    python dcgan.py --generate 1000                         pictures from its best epoch
    python dcgan.py --resume                                continue a run, however it ended

Exit status: 0 on success, 1 for an error you can fix, 2 for a wrong flag, 130 after Ctrl-C.
Sources: Radford et al. 2016, arXiv:1511.06434; Raschka 2021, STAT 453, lecture 18.6.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ---- Networks (Radford et al. 2016, section 3) ----------------------------------------------
LATENT_DIM = 100

def plan_maps(image_size, width):
    """Return the channels of G's feature maps, smallest map first, and the side of that map:
    for 64 and 64, [512, 256, 128, 64] and 4. ValueError if image_size does not fit."""
    channels = []
    side = image_size
    # Each halving of the side doubles the channels, up to 8 * width.
    while side >= 8 and side % 2 == 0:
        side //= 2
        channels.insert(0, width * min(8, 2 ** len(channels)))
    if not channels or side >= 8:
        raise ValueError(f"image_size {image_size} is not 4 to 7 times 2, 4, 8, ...")
    return channels, side

def init_weights(module):
    """Weights ~ N(0, 0.02^2), batch norm scales ~ N(1, 0.02^2) (code of Radford et al.)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)

class Generator(nn.Module):
    """Latents N x latent_dim (or N x latent_dim x 1 x 1) -> images in [-1, 1], N x image_channels
    x image_size x image_size. `slope` is LeakyReLU's: 0.01 in the lecture; 0 gives the paper's
    ReLU."""

    def __init__(self, latent_dim=LATENT_DIM, image_channels=3, width=64, image_size=64, slope=0.2):
        super().__init__()
        channels, side = plan_maps(image_size, width)
        # Shapes at the defaults: 100 x 1 x 1 -> 512 x 4 x 4
        layers = [nn.ConvTranspose2d(latent_dim, channels[0], side, bias=False)]
        # -> 256 x 8 x 8 -> 128 x 16 x 16 -> 64 x 32 x 32 -> 3 x 64 x 64
        for before, after in pairwise([*channels, image_channels]):
            layers += [
                nn.BatchNorm2d(before),
                nn.LeakyReLU(slope, inplace=True),
                # kernel 4, stride 2 and padding 1 double the side
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
            ]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.apply(init_weights)

    def forward(self, latents):
        return self.layers(latents.reshape(len(latents), -1, 1, 1))

class Discriminator(nn.Module):
    """Images in [-1, 1], N x image_channels x image_size x image_size -> float32 logits N x 1,
    positive for real. ValueError for images of another shape. D.layers[:-2] gives features.
    With spectral norm or a gradient penalty, pass `norm=nn.Identity`."""

    def __init__(self, image_channels=3, width=64, image_size=64, slope=0.2, norm=nn.BatchNorm2d):
        super().__init__()
        self.image_shape = (image_channels, image_size, image_size)
        channels, side = plan_maps(image_size, width)
        channels.reverse()
        # Shapes at the defaults: 3 x 64 x 64 -> 64 x 32 x 32
        layers = [
            # kernel 4, stride 2 and padding 1 halve the side
            nn.Conv2d(image_channels, channels[0], 4, 2, 1),
            nn.LeakyReLU(slope, inplace=True),
        ]
        # -> 128 x 16 x 16 -> 256 x 8 x 8 -> 512 x 4 x 4
        for before, after in pairwise(channels):
            layers += [
                nn.Conv2d(before, after, 4, 2, 1, bias=norm is nn.Identity),
                norm(after),
                nn.LeakyReLU(slope, inplace=True),
            ]
        # -> 1 x 1 x 1 -> 1
        last = nn.Conv2d(channels[-1], 1, side)
        self.layers = nn.Sequential(*layers, last, nn.Flatten())
        self.apply(init_weights)

    def forward(self, images):
        # Without this, a larger image would silently give several logits.
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"D takes N x {self.image_shape}, not {tuple(images.shape)}")
        # Under autocast the layers compute in bfloat16; the losses need float32.
        return self.layers(images).float()

# ---- The game (Goodfellow et al. 2014; lecture 18.6) ----------------------------------------
def discriminator_loss(real_logits, fake_logits):
    """Mean binary cross-entropy, with labels 1 for real and 0 for fake."""
    bce = F.binary_cross_entropy_with_logits
    loss_real = bce(real_logits, torch.ones_like(real_logits))
    loss_fake = bce(fake_logits, torch.zeros_like(fake_logits))
    return (loss_real + loss_fake) / 2

def generator_loss(fake_logits):
    """The non-saturating loss: binary cross-entropy with the label of real images."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))

def swap_labels(logits, share):
    """Negate a share of logits: for a symmetric loss, this swaps labels (ganhacks, trick 6)."""
    if share == 0:
        return logits
    swapped = torch.rand_like(logits) < share
    return torch.where(swapped, -logits, logits)

def train_step(
    G, D, optimizer_g, optimizer_d, real, latent_dim=LATENT_DIM, *, fresh_noise=False,
    flip_labels=0.0, loss_for_d=discriminator_loss, loss_for_g=generator_loss,
):
    """Update D, then G, on one batch of real images, N x channels x S x S in [-1, 1].
    G maps latents z ~ N(0, 1), N x latent_dim, to images. D maps images to logits N x 1; the
    sigmoid of a logit is D(x), the estimated probability that x is real. `fresh_noise` draws
    new latents for G's half. `flip_labels` is the share of labels to swap in D's half.
    Returns one detached tensor: loss_d, loss_g, mean D(x), mean D(G(z)). If you pass other
    losses, D(x) and D(G(z)) mean little."""
    # (1) D learns to tell real from fake: maximise log D(x) + log(1 - D(G(z))).
    # Real and fake go through D separately, so that batch norm does not mix them.
    latents = torch.randn(len(real), latent_dim, device=real.device)
    fake = G(latents)
    real_logits = D(real)
    fake_logits = D(fake.detach())  # detached: D's gradient stops here
    loss_d = loss_for_d(
        swap_labels(real_logits, flip_labels),
        swap_labels(fake_logits, flip_labels),
    )
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    # (2) G learns to fool the updated D: maximise log D(G(z)).
    # Minimising log(1 - D(G(z))) has the same goal, but its gradient vanishes while D spots
    # every fake.
    if fresh_noise:
        fake = G(torch.randn_like(latents))
    loss_g = loss_for_g(D(fake))  # again, because D was just updated
    optimizer_g.zero_grad()
    loss_g.backward(inputs=list(G.parameters()))  # through D, but not into it
    optimizer_g.step()

    d_real = real_logits.sigmoid().mean()
    d_fake = fake_logits.sigmoid().mean()
    return torch.stack([loss_d, loss_g, d_real, d_fake]).detach()

@torch.no_grad()
def update_average(average, G, decay, step):
    """Move `average`, initially copy.deepcopy(G).eval(), towards G. `step` counts from 1.
    G and D tend to circle an optimum; averaged weights often lie nearer to it and draw better."""
    # Warm-up: early weights are near random, so use a shorter memory.
    decay = min(decay, step / (9 + step))
    # A state dict holds the network's own tensors: writing into them changes the network.
    latest = G.state_dict()
    for name, mean in average.state_dict().items():
        if mean.is_floating_point():  # not batch norm's counters, which nothing reads
            mean.lerp_(latest[name], 1 - decay)

def adam(network, lr=4e-4, beta1=0.25):
    """Each network's optimiser. These rates learn faster than the paper's and the lecture's,
    which are lr 2e-4 and beta1 0.5 (measured in .github/RESULTS.md)."""
    return torch.optim.Adam(network.parameters(), lr, (beta1, 0.999), fused=True)

def train_steps(G, D, average, optimizer_g, optimizer_d, batches, done=0, decay=0.999, **options):
    """Train on each batch; after each step, yield its number and what train_step returned.
    `done` counts earlier steps: without it, a second call restarts the average's warm-up."""
    for step, real in enumerate(batches, start=done + 1):
        losses = train_step(G, D, optimizer_g, optimizer_d, real, **options)
        update_average(average, G, decay, step)
        yield step, losses

# ==== Above: the whole DCGAN. It needs only torch: copy it as it is ==========================
# Below: data, monitoring and checkpoints, with imports of their own.
# ruff: noqa: E402
import argparse
import copy
import csv
import hashlib
import os
import random
import re
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Callable, NamedTuple
from uuid import uuid4
from zipfile import BadZipFile, ZipFile
from zlib import crc32

import numpy
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist
from torchvision.datasets.utils import download_url
from torchvision.transforms import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

# What torchrun tells each process: its number, how many there are, its number on this machine.
# Ignored without torchrun, because a job scheduler may set the same names.
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK = int(TORCHRUN.get("RANK", 0))
RANKS = int(TORCHRUN.get("WORLD_SIZE", 1))
LOCAL_RANK = int(TORCHRUN.get("LOCAL_RANK", 0))
# To tqdm, None means a bar in a terminal only.
NO_BAR = True if RANK > 0 else None

class UserError(Exception):
    """An error the user can fix: main prints it as one line."""

def say(line):
    """Print a line, or a dict as `name value` pairs, above tqdm's bar, in one process only."""
    if isinstance(line, dict):
        line = " ".join(f"{name} {number}" for name, number in line.items())
    if RANK == 0:
        tqdm.write(line)

@contextmanager
def atomic_write(path):
    """Yield the path of a file to write: on success renamed to `path`, on failure deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}-{uuid4().hex}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

# ---- Pictures in: from a path to one uint8 tensor, from that tensor to batches in [-1, 1] ---
CELEBA_FOLDER = Path("data/celeba")
CELEBA_ZIP = "img_align_celeba.zip"
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"
CELEBA_URLS = (
    "https://drive.google.com/file/d/0B7EVK8r0v71pZjFTYXZWM3FlRnM/view",
    f"https://cseweb.ucsd.edu/~weijian/static/datasets/celeba/{CELEBA_ZIP}",
    f"https://graal.ift.ulaval.ca/public/celeba/{CELEBA_ZIP}",
)
CELEBA_COUNT = 202_599
CELEBA_TRAINING_COUNT = 162_770
DATA_HELP = f"use --data toy or FOLDER_OR_ZIP, or put {CELEBA_ZIP} into {CELEBA_FOLDER}"

def toy_faces(count=4096, image_size=64):
    """Draw simple faces, all different: uint8, count x 3 x image_size x image_size."""
    rng = random.Random(0)
    faces = []
    for _ in range(count):
        background = f"hsl({rng.randint(0, 360)}, 30%, 60%)"
        hair = f"hsl(30, 50%, {rng.randint(5, 50)}%)"
        lightness = rng.randint(45, 85)
        size = image_size * rng.uniform(0.7, 1)
        corner = rng.uniform(0, image_size - size)
        image = Image.new("RGB", (image_size, image_size), background)
        draw = ImageDraw.Draw(image)
        # Hair, skin, lips and two eyes: left, top, right and bottom as shares of the head.
        for color, *edges in (
            (hair, 0.15, 0.05, 0.85, 0.85),
            (f"hsl(25, 50%, {lightness}%)", 0.22, 0.15, 0.78, 0.95),
            (f"hsl(0, 60%, {lightness - 20}%)", 0.35, 0.70, 0.60, 0.77),
            ("#123", 0.32, 0.42, 0.42, 0.50),
            ("#123", 0.58, 0.42, 0.68, 0.50),
        ):
            draw.ellipse([corner + size * edge for edge in edges], color)
        faces.append(TF.pil_to_tensor(image))
    return torch.stack(faces)

class File(NamedTuple):
    """A file's path in the folder or .zip, a stamp of its content, and what returns its bytes."""
    name: str
    stamp: tuple
    read: Callable

def list_files(source):
    """Yield the files below a folder, links followed, or in a .zip. UserError if source is
    neither, OSError for an unreadable subfolder or a broken link."""
    def fail(error):
        raise error

    if source.is_dir():
        for folder, _, names in os.walk(source, onerror=fail, followlinks=True):
            for name in names:
                path = Path(folder, name)
                stat = path.stat()
                stamp = stat.st_size, stat.st_mtime_ns
                yield File(path.relative_to(source).as_posix(), stamp, path.read_bytes)
        return

    try:
        archive = ZipFile(source)
    except (OSError, BadZipFile) as error:
        raise UserError(f"{source} is neither a folder nor a readable .zip ({error}); {DATA_HELP}")
    for info in archive.infolist():
        stamp = info.file_size, info.CRC
        yield File(info.filename, stamp, partial(archive.read, info))

def is_picture(name):
    """Whether Pillow knows this ending, and no part of the path is hidden."""
    known = Path(name).suffix.lower() in Image.registered_extensions()
    # A name that begins with a dot; ./ and ../ are no such names.
    hidden = re.search(r"(^|/)\.[^./]", name)
    return known and not hidden

def get_celeba():
    """Return the archive of CelebA's aligned faces, if need be downloaded (1.4 GB) from the
    first source that works; or the folder, if they were unpacked there."""
    archive = CELEBA_FOLDER / CELEBA_ZIP
    if archive.exists():
        return archive
    if any(CELEBA_FOLDER.rglob("*.jpg")):
        return CELEBA_FOLDER
    for url in CELEBA_URLS:
        try:
            with atomic_write(archive) as unfinished:
                download_url(url, unfinished.parent, unfinished.name, CELEBA_MD5)
            return archive
        except Exception as error:
            # gdown, the network and the disk fail in many ways.
            say(f"no CelebA from {url}: {error!r}")
    raise UserError(f"no source of CelebA could be used; {DATA_HELP}")

def decode(data, image_size=64, crop=None):
    """An encoded picture (bytes) -> its centred square, resized: RGB (PIL). `crop` is the side
    of the square: by default 160 for pictures of CelebA's 178 x 218 pixels, as in the lecture,
    and the largest for others. ValueError for Pillow's modes of more than 8 bits a channel."""
    picture = Image.open(BytesIO(data))
    # Converting would clip these: I and I;16 (integers) and F (floats).
    if picture.mode[0] in "IF":
        raise ValueError(f"more than 8 bits a channel (mode {picture.mode})")
    # Read the pixels first: broken ones are an error, malformed EXIF data are not.
    picture.load()
    with suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)

    if crop is None:
        crop = 160 if picture.size == (178, 218) else min(picture.size)
    square = TF.center_crop(picture, min(crop, *picture.size))
    return TF.resize(square.convert("RGB"), image_size)

def write_cache(cache, pictures, image_size, crop):
    """Write the pictures as RGB bytes, one after another, without the broken ones. UserError if
    all are broken."""
    broken = []

    def prepare(part):
        pixels = b""
        for picture in part:
            try:
                pixels += decode(picture.read(), image_size, crop).tobytes()
            except Exception as error:
                # A broken picture may raise anything. A system error, such as too many open
                # files, must not leave a picture out of the cache for good. It has an errno;
                # Pillow's OSError for a broken file has not.
                if isinstance(error, MemoryError) or getattr(error, "errno", None):
                    raise
                broken.append(f"skipped {picture.name}: {error!r}")
        return pixels

    # In parts, because one task per picture takes a tenth longer.
    parts = [pictures[first:first + 64] for first in range(0, len(pictures), 64)]
    # More threads than cores are slower; more than eight could fill the memory with large photos.
    threads = ThreadPoolExecutor(min(8, os.cpu_count()))
    with threads, atomic_write(cache) as unfinished, open(unfinished, "wb") as file:
        prepared = threads.map(prepare, parts)
        file.writelines(tqdm(prepared, "preparing, 64 at a time", len(parts), disable=NO_BAR))
        for line in broken[:10]:
            say(line)
        if len(broken) == len(pictures):
            raise UserError(f"all {len(pictures)} pictures are broken; {DATA_HELP}")

def load_images(path, image_size=64, crop=None):
    """A folder, a .zip or "toy" as one tensor: uint8, N x 3 x image_size x image_size. UserError
    if no picture can be read. It is mapped from a cache in data/, not read into memory;
    writing to it leaves the cache alone. Delete the cache after changing `decode`."""
    if str(path) == "toy":
        return toy_faces(image_size=image_size)
    path = Path(path)
    if path == CELEBA_FOLDER:
        path = get_celeba()

    pictures = [file for file in list_files(path) if is_picture(file.name)]
    pictures.sort(key=lambda picture: picture.name)
    if not pictures:
        raise UserError(f"no pictures in {path}; {DATA_HELP}")
    # Of the complete CelebA, keep the training partition.
    if len(pictures) == CELEBA_COUNT:
        del pictures[CELEBA_TRAINING_COUNT:]

    stamps = [(picture.name, picture.stamp) for picture in pictures]
    key = ascii([image_size, crop, stamps]).encode()
    cache = Path("data", f"{hashlib.md5(key).hexdigest()}.dcgan")
    if not cache.exists():
        write_cache(cache, pictures, image_size, crop)

    # Mode "c" maps it privately: copied on write, and the cache need not be writable.
    pixels = torch.from_numpy(numpy.memmap(cache, mode="c"))
    images = pixels.view(-1, image_size, image_size, 3)
    say(f"{path}: {len(images)} of {len(pictures)} pictures can be read")
    return images.permute(0, 3, 1, 2)

def batches(images, batch_size, epochs=1, seed=42, done=0, device="cpu", rank=0, ranks=1):
    """uint8 images N x C x S x S -> the batches after the first `done`, floats in [-1, 1]; an
    incomplete last batch is dropped. Each process (rank) gets its share of every batch. Seed
    and epoch decide the order. Seed, step and rank decide what torch draws in a step, so that a
    resumed run draws the same noise."""
    if images.dtype != torch.uint8:
        raise ValueError(f"batches takes uint8 images, not {images.dtype}")
    epoch_steps = len(images) // batch_size
    for step in range(done, epochs * epoch_steps):
        epoch, index = divmod(step, epoch_steps)
        if step == done or index == 0:
            torch.manual_seed(crc32(f"order {seed} {epoch}".encode()))
            order = torch.randperm(len(images), device="cpu").to(images.device)
        first = index * batch_size
        chosen = order[first + rank:first + batch_size:ranks]
        batch = images[chosen].to(device) / 127.5 - 1
        # The step that takes this batch draws its noise from torch's global generator.
        torch.manual_seed(crc32(f"noise {seed} {step + 1} {rank}".encode()))
        yield batch.contiguous(memory_format=torch.channels_last)

# ---- Pictures out: sample, measure, plot, animate -------------------------------------------
@torch.no_grad()
def sample(G, latents):
    """Latents N x latent_dim -> uint8 N x channels x S x S on the CPU. G must be in eval mode."""
    device = next(G.parameters()).device
    parts = []
    for part in latents.split(128):
        images = G(part.to(device)) * 127.5 + 127.5
        parts.append(images.round().byte().cpu())
    return torch.cat(parts)

def compare(fake, real):
    """uint8 images N x C x S x S, two or more of each -> Frechet distance (lower is better) and
    diversity (1 is healthy, near 0 is a collapse). The distance is FID's (Heusel et al. 2017,
    arXiv:1706.08500), but of random projections of the pixels. Diversity is the spread of fakes
    over that of reals, a geometric mean over 32 directions: an arithmetic one would miss a
    collapse, because background and brightness vary even when all faces are alike."""
    # Project onto 128 fixed random unit vectors, on the CPU even if torch has another default.
    rng = torch.Generator("cpu").manual_seed(0)
    vectors = torch.randn(real[0].numel(), 128, generator=rng, device="cpu")
    vectors = F.normalize(vectors, dim=0)
    # Rounding to bytes, 1/127.5 apart, has a variance of that distance squared over 12. It
    # keeps the determinant above zero when all pictures are equal.
    rounding = torch.eye(32, device="cpu") / 127.5**2 / 12

    def moments(images):
        points = ((images.flatten(1) / 127.5) @ vectors).double()
        cov = points.T.cov()
        # A determinant is the product of 32 principal variances, so its 64th root is a mean
        # standard deviation. More directions would measure fine detail, too, which even healthy
        # runs lack.
        log_spread = (cov[:32, :32] + rounding).logdet() / 64
        return points.mean(0), cov, log_spread

    fake_mean, fake_cov, fake_log_spread = moments(fake)
    real_mean, real_cov, real_log_spread = moments(real)
    # |m - n|^2 + trace(A + B - 2 sqrt(A B)) for means m, n and covariances A, B. The trace of a
    # root is the sum of the roots of the eigenvalues.
    gap = fake_mean - real_mean
    roots = torch.linalg.eigvals(fake_cov @ real_cov).sqrt().real
    distance = gap @ gap + (fake_cov + real_cov).trace() - 2 * roots.sum()
    diversity = (fake_log_spread - real_log_spread).exp()
    return distance.item(), diversity.item()

def plot_losses(losses, epochs, path):
    """Plot loss_d and loss_g (steps x 2), each as 280 means, two pixels apart. The axis fits all
    but the first five, which are often far above the others."""
    means = F.adaptive_avg_pool1d(losses.T, 280)
    low = means.min().clamp(max=0)
    high = means[:, 5:].max()
    y = 320 - 280 * (means.clamp(max=high) - low) / (high - low)
    image = Image.new("RGB", (640, 360), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((50, 40, 610, 320), outline="grey")
    title = f"loss {low:.3g} to {high:.3g}, {epochs} epochs; discriminator: blue, generator: orange"
    draw.text((50, 15), title, "black")
    for curve, color in zip(y.tolist(), ["#1f5fa8", "#d2691e"]):
        draw.line(list(zip(range(50, 610, 2), curve)), color, width=2)
    image.save(path)

def animate(folder, path):
    """Make a GIF of the grids in `folder`: at most 100, evenly spread, up to the last one."""
    grids = folder.glob("epoch_*.png")
    grids = sorted(grids, key=lambda grid: int(grid.stem.removeprefix("epoch_")))
    every = 1 + len(grids) // 100
    # Chosen from the end, so that the last grid is always among them.
    first, *others = map(Image.open, grids[::-every][::-1])
    first.save(path, save_all=True, append_images=others, duration=500, loop=0)

# ---- Devices, and several processes in torchrun ---------------------------------------------
def find_device(name, precision):
    """Return the device, and "bf16" or "fp32". The name "auto" is an accelerator if torch finds
    one, "cuda" each process's own GPU. The precision "auto" is bf16 where it is native.
    UserError if the device cannot be used."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    try:
        zero = torch.zeros(1, device=name)
        # Reading it fails on a device without memory, such as meta.
        zero.item()
    except Exception as error:
        # Each kind of device has errors of its own.
        raise UserError(f"--device {name} cannot be used, try --device cpu: {error!r}")

    if zero.is_cuda:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # The public torch.cpu.get_capabilities is missing in torch 2.7.
        native = zero.is_cpu and torch.cpu._is_avx512_bf16_supported()
    if precision == "auto":
        precision = "bf16" if native else "fp32"
    return zero.device, precision

def average_ranks(tensor):
    """Wait for all processes and average a tensor in place. UserError if one has ended."""
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise UserError(f"another process of this run has ended: {error!r}")
    tensor /= RANKS

# ---- The run --------------------------------------------------------------------------------
# In seconds, not in steps: a step takes a second on a CPU and milliseconds on a GPU.
SAVE_SECONDS = 60

class Run:
    """All training state. A checkpoint holds each attribute, or its state_dict if it has one,
    under the attribute's name: renaming an attribute changes the file format."""

    def __init__(self, args, device):
        torch.manual_seed(args.seed)
        # Kept, because they are needed to build a checkpoint's networks again.
        sizes = {"width": args.width, "image_size": args.image_size}
        self.G_arguments = {"latent_dim": LATENT_DIM, "slope": args.slope_g, **sizes}
        self.D_arguments = {"slope": args.slope_d, **sizes}
        self.G = Generator(**self.G_arguments)
        self.D = Discriminator(**self.D_arguments)
        for network in self.G, self.D:
            network.to(device, memory_format=torch.channels_last)
        # All pictures are drawn by this average of G.
        self.average = copy.deepcopy(self.G).eval()
        self.optimizer_g = adam(self.G, args.lr_g, args.beta1)
        if args.optimizer_d == "sgd":
            self.optimizer_d = torch.optim.SGD(self.D.parameters(), args.lr_d)
        else:
            self.optimizer_d = adam(self.D, args.lr_d, args.beta1)

        self.fixed_noise = torch.randn(1024, LATENT_DIM)
        # How many whole batches the pictures fill; 0 until they are loaded.
        self.epoch_steps = 0
        # How many steps are done, and what train_step returned for each.
        self.step = 0
        self.losses = torch.empty(0, 4)
        # The rows of log.csv, one an epoch.
        self.rows = []
        # All flags but those that belong to one call, not to the run.
        self.settings = vars(args).copy()
        for name in "out", "resume", "generate":
            del self.settings[name]

    def save(self, path):
        """Write all attributes; UserError if a weight or a loss is infinite or NaN."""
        self.check_finite()
        state = {}
        for name, value in vars(self).items():
            state[name] = value.state_dict() if hasattr(value, "state_dict") else value
        # Via memory, because on a full disk torch.save would not raise an OSError.
        buffer = BytesIO()
        torch.save(state, buffer)
        with atomic_write(path) as unfinished:
            unfinished.write_bytes(buffer.getbuffer())

    def load(self, state):
        """Restore what `save` wrote, except the settings: some may differ now."""
        try:
            for name, value in vars(self).items():
                if hasattr(value, "load_state_dict"):
                    value.load_state_dict(state[name])
                elif name != "settings":
                    setattr(self, name, state[name])
        except Exception as error:
            raise UserError(f"the checkpoint does not fit this version of dcgan.py: {error!r}")

    def check_finite(self):
        """Raise UserError if a weight or a loss is infinite or NaN."""
        # One norm of all tensors, so that the host waits for the GPU once.
        tensors = self.losses, *self.G.parameters(), *self.D.parameters()
        if not nn.utils.get_total_norm(tensors).isfinite():
            raise UserError(
                f"a loss or weight is not finite at step {self.step}, so it is not saved; "
                "try lower --lr-g and --lr-d with a new --out"
            )

    def make_row(self, losses, **measures):
        """A row of log.csv: what train_step returned, and measures by name, to four digits."""
        names = "loss_d", "loss_g", "D(x)", "D(G(z))"
        measures = dict(zip(names, losses.tolist(), strict=True)) | measures
        rounded = {name: float(f"{number:.4g}") for name, number in measures.items()}
        return {"epoch": len(self.rows) + 1, "step": self.step} | rounded

    def remaining_steps(self, images, args, device, precision):
        """train_steps over what is left. From now on G and D, but not self.average, compute
        under autocast and, in torchrun, average their gradients."""
        # As a decorator of forward, autocast covers the networks, not the losses.
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        for network in self.G, self.D:
            network.forward = autocast(network.forward)
            if RANKS > 1:
                for parameter in network.parameters():
                    parameter.register_post_accumulate_grad_hook(lambda p: average_ranks(p.grad))

        return train_steps(
            self.G, self.D, self.average, self.optimizer_g, self.optimizer_d,
            batches(
                images, args.batch_size, args.epochs, args.seed, self.step, device, RANK, RANKS
            ),
            done=self.step,
            decay=args.ema,
            latent_dim=LATENT_DIM,
            fresh_noise=args.fresh_noise,
            flip_labels=args.flip_labels,
        )

    def end_epoch(self, real, out, seconds):
        """Draw and measure the average's fakes, write the epoch's files, keep the best epoch,
        and print the epoch's line and what is wrong. `seconds` is the time since the start."""
        self.check_finite()
        losses = self.losses.cpu()
        mean = losses[-self.epoch_steps:].mean(0)
        fakes = sample(self.average, self.fixed_noise)
        frechet, diversity = compare(fakes, real)
        row = self.make_row(mean, frechet=frechet, diversity=diversity)
        is_best = all(row["frechet"] < earlier["frechet"] for earlier in self.rows)
        self.rows.append(row)

        epoch = row["epoch"]
        save_image(fakes[:64] / 255, out / "samples" / f"epoch_{epoch:03d}.png")
        plot_losses(losses[:, :2], epoch, out / "losses.png")
        try:
            with atomic_write(out / "log.csv") as path, open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, row, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
        except OSError as error:
            # On Windows, a file that is open in Excel cannot be replaced.
            say(f"log.csv stays as it is, its rows are in checkpoint.pt: {error}")
        if is_best:
            self.save(out / "best.pt")

        say(row | {"time": timedelta(seconds=round(seconds))})
        for trouble in self.find_troubles():
            say(f"warning: {trouble}")

    def find_troubles(self):
        """Return a list of what is wrong after the latest epoch."""
        latest = self.rows[-1]
        distances = [row["frechet"] for row in self.rows]
        d_fake = self.losses[-self.epoch_steps:, 3]
        troubles = []
        # Early on, even in healthy runs, fakes look alike and D spots them all.
        if latest["step"] > 500:
            if latest["diversity"] < 0.7:
                troubles.append("the generator collapses: its pictures are too similar")
            # In a healthy run, D may spot nearly every fake, but not in every step of an epoch.
            if d_fake.max() < 0.01:
                troubles.append("the discriminator has won: it spots every fake in every step")
        if min(distances[-5:]) > 1.1 * min(distances):
            best = 1 + distances.index(min(distances))
            troubles.append(f"past its best, which was epoch {best} (best.pt)")
        return troubles

def load_pictures(run, args, device):
    """Load the pictures and tell the run how many batches they fill. In torchrun, join the other
    processes first; one of each machine prepares the pictures while the others wait."""
    if args.batch_size % RANKS:
        raise UserError(f"{RANKS} processes cannot share --batch-size {args.batch_size} evenly")
    if RANKS > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    # A barrier: averaging anything makes the others wait, for hours if need be, until the first
    # process of each machine has written the cache.
    if LOCAL_RANK > 0:
        average_ranks(torch.zeros(1))
    images = load_images(args.data, args.image_size, args.crop)
    if RANKS > 1 and LOCAL_RANK == 0:
        average_ranks(torch.zeros(1))

    epoch_steps = len(images) // args.batch_size
    if epoch_steps == 0:
        raise UserError(f"{len(images)} pictures do not fill --batch-size {args.batch_size}")
    if run.epoch_steps not in (0, epoch_steps):
        raise UserError(f"--data has {epoch_steps} batches, but the run had {run.epoch_steps}")
    run.epoch_steps = epoch_steps
    # On the GPU, choosing a batch is fastest. Half of its free memory is left to training.
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    return images

def train(run, args, device, precision):
    """Train a new or loaded run up to args.epochs, into args.out; in torchrun, as one rank."""
    images = load_pictures(run, args, device)
    checkpoint = args.out / "checkpoint.pt"
    # What fakes are compared with: at most 1,024 pictures, evenly spread.
    real = images[::len(images) // 1024 + 1].cpu()
    if RANK == 0:
        (args.out / "samples").mkdir(parents=True, exist_ok=True)
        save_image(real[:64] / 255, args.out / "real.png")
        # From now on, a new run into this folder is refused.
        run.save(checkpoint)
    left = max(0, run.epoch_steps * args.epochs - run.step)
    say(f"{device}, {precision}; {left} steps left of --epochs {args.epochs}; see {args.out}")

    # All batches have one shape, so let cuDNN try out its kernels and keep the fastest.
    torch.backends.cudnn.benchmark = True
    started = time.monotonic()
    saved_at = started
    saved_step = run.step
    steps = run.remaining_steps(images, args, device, precision)
    try:
        for step, losses in tqdm(steps, total=left, disable=NO_BAR):
            run.step = step
            # Only rank 0 measures and saves: all ranks hold the same weights, though each has
            # its own statistics in batch norm.
            if RANK > 0:
                continue
            # Kept on the GPU, as fetching them would make the host wait at each step. The
            # growing copy is cheap: 400 KB after 20 epochs of CelebA.
            run.losses = torch.cat([run.losses.to(device), losses[None]])
            epoch_ended = step % run.epoch_steps == 0
            if epoch_ended:
                run.end_epoch(real, args.out, time.monotonic() - started)
            elif step % args.log_interval == 0:
                say(run.make_row(losses))
            if epoch_ended or time.monotonic() - saved_at > SAVE_SECONDS:
                run.save(checkpoint)
                saved_step = step
                saved_at = time.monotonic()
    except KeyboardInterrupt:
        # Not saved now: it may have come in the middle of a step.
        raise KeyboardInterrupt(f"(--resume goes on after step {saved_step})") from None

    if RANK == 0:
        animate(args.out / "samples", args.out / "samples.gif")
    # Not in a finally: NCCL may hang after an error of one rank.
    if RANKS > 1:
        dist.destroy_process_group()

def generate(run, count, out, seed):
    """Write `count` pictures of the run's average into out/generated, a grid, and walk.png.
    Each row of walk.png goes straight from one latent to another: gradual changes suggest
    learning, sudden ones memorising (Radford et al. 2016, section 6.1)."""
    torch.manual_seed(seed)
    images = sample(run.average, torch.randn(count, LATENT_DIM))
    save_image(images[:64] / 255, out / "generated.png")
    # Eight walks of eight pictures: 8 x 8 x LATENT_DIM latents.
    begin, end = torch.randn(2, 8, 1, LATENT_DIM)
    position = torch.linspace(0, 1, 8)[:, None]
    walk = begin.lerp(end, position).flatten(0, 1)
    save_image(sample(run.average, walk) / 255, out / "walk.png")

    folder = out / "generated"
    folder.mkdir(exist_ok=True)
    # An earlier call may have left more pictures than this one writes.
    for file in folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9].png"):
        file.unlink()
    for i, image in enumerate(images, 1):
        save_image(image / 255, folder / f"{i:06d}.png")
    say(f"epoch {run.rows[-1]['epoch']}: {count} pictures in {folder} and {folder}.png")

# ---- The command line -----------------------------------------------------------------------
def natural(text):
    """An argparse type: a whole number, at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)

def fraction(text):
    """An argparse type: a number in [0, 1)."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return float(text)

def parse_args(argv, **settings):
    """Return the command line as a namespace; a checkpoint's `settings` replace the defaults."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def flag(name, kind, default, text, choices=None):
        parser.add_argument(name, type=kind, default=default, help=text, choices=choices)

    flag("--data", str, str(CELEBA_FOLDER), "folder or .zip of pictures, or toy")
    flag("--image-size", int, 64, "in pixels", [32, 64, 96, 128, 256])
    flag("--crop", natural, None, "side of the centre crop; CelebA: 160, else the largest")
    flag("--width", natural, 64, "channels of the largest feature maps")
    flag("--slope-g", fraction, 0.2, "of the generator's LeakyReLU; 0 is ReLU")
    flag("--slope-d", fraction, 0.2, "of the discriminator's LeakyReLU")
    flag("--ema", fraction, 0.999, "decay of the generator's moving average")
    flag("--epochs", natural, 20, "passes over the pictures")
    flag("--batch-size", natural, 128, "images per step")
    flag("--lr-g", fraction, 4e-4, "generator's learning rate (the paper: 2e-4)")
    flag("--lr-d", fraction, 4e-4, "discriminator's learning rate (the paper: 2e-4)")
    flag("--beta1", fraction, 0.25, "of Adam (the paper: 0.5)")
    flag("--optimizer-d", str, "adam", "of the discriminator", ["adam", "sgd"])
    flag("--flip-labels", fraction, 0.0, "share of the discriminator's labels to swap")
    flag("--out", Path, "out", "output folder")
    flag("--generate", natural, None, "draw this many pictures with the run's best epoch")
    flag("--seed", int, 42, "random seed")
    flag("--device", str, "auto", "auto, cpu, cuda, cuda:1, mps, ...")
    flag("--precision", str, "auto", "auto: bf16 if native", ["auto", "bf16", "fp32"])
    flag("--log-interval", natural, 100, "steps between printed lines")
    parser.add_argument("--fresh-noise", action="store_true", help="new noise for G's half")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.set_defaults(**settings)
    return parser.parse_args(argv)

def read_checkpoint(argv, args):
    """Return `args` and None, or for --resume and --generate the command line parsed again, with
    a checkpoint's settings as defaults, and the checkpoint."""
    path = args.out / ("best.pt" if args.generate else "checkpoint.pt")
    if not args.resume and not args.generate:
        if path.exists():
            raise UserError(f"{args.out} holds a run: --resume it, delete it or use another --out")
        return args, None
    try:
        saved = torch.load(path, "cpu", weights_only=True)
        settings = saved["settings"]
    except Exception as error:
        raise UserError(f"{path} cannot be read, train first or check --out: {error!r}")

    args = parse_args(argv, **settings)
    may_change = {"data", "epochs", "seed", "device", "precision", "log_interval"}
    for name in settings.keys() - may_change:
        if getattr(args, name) != settings[name]:
            raise UserError(f"this run's {name} is {settings[name]} and cannot change")
    return args, saved

def main(argv=None):
    """Train or generate. Errors the user can fix become one line on standard error."""
    args = parse_args(argv)
    # A file's name may contain characters that the console cannot show.
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        args, saved = read_checkpoint(argv, args)
        source = Path(args.data).resolve()
        if args.data != "toy" and args.out.resolve().is_relative_to(source):
            raise UserError(f"--out {args.out} lies in --data: its pictures would be trained on")
        device, precision = find_device(args.device, args.precision)
        run = Run(args, device)
        if saved:
            run.load(saved)
        if not args.generate:
            train(run, args, device, precision)
        elif RANK == 0:
            generate(run, args.generate, args.out, args.seed)
    except KeyboardInterrupt as interrupt:
        if RANK == 0:
            print("dcgan.py: interrupted", *interrupt.args, file=sys.stderr)
        raise SystemExit(130)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error) or repr(error)
        raise SystemExit(textwrap.shorten(f"dcgan.py: error: {reason}", 400))

if __name__ == "__main__":
    main()
