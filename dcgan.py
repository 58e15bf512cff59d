# SPDX-License-Identifier: MIT
"""DCGAN in one file: learn from pictures of faces to draw people who do not exist.

    python dcgan.py --data toy --epochs 3 --out out-toy     drawn faces, no download
    python dcgan.py --epochs 20                             CelebA, the lecture's faces
    python dcgan.py --generate 1000                         pictures from its best epoch

Ctrl-C or SIGTERM during training saves and exits with 130 or 143; a wrong flag exits with 2, any
other error to fix with 1.
Sources: Radford et al. 2016, arXiv:1511.06434; Raschka 2021, STAT 453, lecture 18.6.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ---- Networks (Radford et al. 2016, section 3) ---------------------------------------------------
LATENT_DIM = 100
# image size: channels of each map as multiples of the width, from the smallest map up to the one
# of half the image's side; sides double. To add 96, write 96: (8, 4, 2, 1), which starts at 6 x 6
WIDTHS = {32: (4, 2, 1), 64: (8, 4, 2, 1), 128: (8, 8, 4, 2, 1), 256: (8, 8, 8, 4, 2, 1)}

def plan_maps(image_size, width):
    """Return the maps' channels and the smallest map's side (4 here), or raise ValueError."""
    if image_size not in WIDTHS:
        raise ValueError(f"image_size {image_size} is not one of {list(WIDTHS)}")
    factors = WIDTHS[image_size]
    side, rest = divmod(image_size, 2**len(factors))
    if rest:
        raise ValueError(f"image_size {image_size} cannot be halved {len(factors)} times")
    return [factor * width for factor in factors], side

def init_weights(module):
    """Weights ~ N(0, 0.02) (Radford et al. 2016, section 4), batch norm scales ~ N(1, 0.02) (their
    code); 0.02 is the std. Add spectral norm later: it makes module.weight a computed copy."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)

def block(convolution, inputs, outputs, slope, kernel=4, stride=2, padding=1):
    """By default Conv2d halves the side of a map, and ConvTranspose2d doubles it."""
    return nn.Sequential(
        convolution(inputs, outputs, kernel, stride, padding, bias=False),  # batch norm has a bias
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(slope, inplace=True),
    )

class Generator(nn.Sequential):
    """Latents N x latent_dim -> images N x channels x image_size x image_size in [-1, 1].
    LeakyReLU as in the lecture, there with slope 0.01; with `slope` 0 it is the paper's ReLU."""

    def __init__(self, latent_dim=LATENT_DIM, channels=3, width=64, image_size=64, slope=0.2):
        widths, side = plan_maps(image_size, width)
        up = nn.ConvTranspose2d
        super().__init__(                                           # shapes at the defaults:
            nn.Unflatten(1, (latent_dim, 1, 1)),                                    # 100 x 1 x 1
            block(up, latent_dim, widths[0], slope,
                  kernel=side, stride=1, padding=0),                                # 512 x 4 x 4
            *[block(up, a, b, slope) for a, b in pairwise(widths)],     # 3 blocks to 64 x 32 x 32
            up(widths[-1], channels, 4, stride=2, padding=1),                       # 3 x 64 x 64
            nn.Tanh(),
        )
        self.apply(init_weights)

class Discriminator(nn.Sequential):
    """Images N x channels x image_size x image_size in [-1, 1] -> logits N x 1, positive: real."""

    def __init__(self, channels=3, width=64, image_size=64, slope=0.2):
        widths, side = plan_maps(image_size, width)
        widths, down = widths[::-1], nn.Conv2d
        super().__init__(                                           # at the defaults: 3 x 64 x 64
            down(channels, widths[0], 4, stride=2, padding=1),                      # 64 x 32 x 32
            nn.LeakyReLU(slope, inplace=True),
            *[block(down, a, b, slope) for a, b in pairwise(widths)],   # 3 blocks to 512 x 4 x 4
            down(widths[-1], 1, side),                                              # 1 x 1 x 1
            nn.Flatten(),                                                           # 1
        )
        self.apply(init_weights)

# ---- The game (Goodfellow et al. 2014; lecture 18.6) ---------------------------------------------
def bce(logits, label, flip=0.0, rng=None):
    """Mean binary cross-entropy of logits N x 1 with a label, 1 for real or 0 for fake.
    Each label is swapped with probability `flip` (ganhacks, trick 6)."""
    labels = torch.full_like(logits, label)
    if flip:
        labels[torch.rand(logits.shape, device=logits.device, generator=rng) < flip] = 1 - label
    return F.binary_cross_entropy_with_logits(logits, labels)

def train_step(G, D, optimizer_g, optimizer_d, real, latent_dim=LATENT_DIM, *, bf16=False,
               fresh_noise=False, flip_labels=0.0, rng=None):
    """Update D, then G, on one batch of real images, N x channels x S x S in [-1, 1].
    G maps latents z, normal noise N x latent_dim, to images. D maps images to logits N x 1; the
    sigmoid of a logit is D(x), the estimated probability that x is real. With `bf16`, the networks
    compute in bfloat16, the losses in float32. `fresh_noise` draws new latents for (2), and
    `flip_labels` is the share of labels to swap in (1). `rng`: a torch.Generator on real's device.
    Returns one tensor: loss_d, loss_g, mean D(x), mean D(G(z)); only loss_g is of the updated D."""
    autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=bf16)

    def noise():
        return torch.randn(len(real), latent_dim, device=real.device, generator=rng)

    # (1) D learns to tell real from fake: maximise log D(x) + log(1 - D(G(z))). Real and fake go
    # through D separately, so that batch norm does not mix them
    with autocast:
        fake = G(noise())
        real_logits = D(real).float()
        fake_logits = D(fake.detach()).float()      # detached: this half leaves G alone
    loss_d = (bce(real_logits, 1, flip_labels, rng) + bce(fake_logits, 0, flip_labels, rng)) / 2
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    # (2) G learns to be taken for real by that new D: maximise log D(G(z)), the non-saturating
    # loss. log(1 - D(G(z))) has the same goal, but its gradient vanishes while D spots every fake
    with autocast:
        if fresh_noise:
            fake = G(noise())
        logits = D(fake).float()        # again, because D was just updated
    loss_g = bce(logits, 1)
    optimizer_g.zero_grad()
    loss_g.backward(inputs=list(G.parameters()))        # D passes the gradient on and keeps none
    optimizer_g.step()

    # the sigmoids fit this loss only; for another, drop them and the 0.05 check in find_troubles
    return torch.stack([loss_d, loss_g, real_logits.sigmoid().mean(),
                        fake_logits.sigmoid().mean()]).detach()

@torch.no_grad()
def update_average(average, G, decay, step):
    """Move `average`, which began as copy.deepcopy(G).eval(), towards G after step `step`, from 1.
    G and D tend to circle an optimum; averaged weights often lie nearer to it and draw better."""
    decay = min(decay, step / (9 + step))   # early weights are near random: use a shorter memory
    # a state dict holds the network's own tensors: writing into them changes the network
    for mean, latest in zip(average.state_dict().values(), G.state_dict().values()):
        if mean.is_floating_point():        # weights, and the statistics of batch norm
            mean.lerp_(latest, 1 - decay)
        else:                               # the number of batches that batch norm has seen
            mean.copy_(latest)

# ==== Above: the whole DCGAN. It needs only torch: copy it as it is ===============================
# Below: what feeds, watches and saves it, with its own imports.
# ruff: noqa: E402
import argparse
import copy
import csv
import os
import random
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from io import BytesIO
from multiprocessing.pool import ThreadPool
from operator import itemgetter
from pathlib import Path, PurePosixPath
from uuid import NAMESPACE_URL, uuid4, uuid5
from zipfile import BadZipFile, ZipFile
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist
from torchvision.datasets import CelebA
from torchvision.datasets.utils import download_url
from torchvision.transforms import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

# what torchrun tells each process: its number, how many there are, its number on this machine
RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))

class UserError(Exception):
    """An error the user can fix: main prints it as one line."""

def seed_of(*parts):
    """Hash the parts to a seed: (42, 2) and (43, 1) get unrelated ones. CPUs use only 32 bits."""
    return random.Random(repr(parts)).getrandbits(32)

@contextmanager
def atomic_write(path):
    """Yield the path of a file to write: on success it is renamed to `path`, on failure deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}-{uuid4().hex}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

# ---- Pictures in: from a path to one uint8 tensor, from that tensor to batches in [-1, 1] --------
CELEBA_FOLDER = Path("data/celeba")
CELEBA_ID, CELEBA_MD5, CELEBA_ZIP = CelebA.file_list[0]      # of the archive of aligned faces
CELEBA_URLS = (
    f"https://drive.google.com/file/d/{CELEBA_ID}/view",
    f"https://cseweb.ucsd.edu/~weijian/static/datasets/celeba/{CELEBA_ZIP}",
    f"https://graal.ift.ulaval.ca/public/celeba/{CELEBA_ZIP}",
)
DATA_HELP = f"use --data toy or FOLDER_OR_ZIP, or put {CELEBA_ZIP} into {CELEBA_FOLDER} by hand"

def toy_faces(count=4096, image_size=64):
    """Draw simple faces, all different: uint8, count x 3 x image_size x image_size."""
    rng, faces = random.Random(0), []
    for _ in range(count):
        size, skin = image_size * rng.uniform(0.7, 1), rng.randint(45, 85)
        corner = rng.uniform(0, image_size - size)
        image = Image.new("RGB", (image_size, image_size), f"hsl({rng.randint(0, 360)}, 30%, 60%)")
        for color, *box in (        # left, top, right, bottom
                (f"hsl(30, 50%, {rng.randint(5, 50)}%)", 0.15, 0.05, 0.85, 0.85),           # hair
                (f"hsl(25, 50%, {skin}%)", 0.22, 0.15, 0.78, 0.95),                         # face
                (f"hsl(0, 60%, {skin - 20}%)", 0.35, 0.7, 0.6, 0.77),                       # mouth
                ("#123", 0.32, 0.42, 0.42, 0.5),                                            # eyes
                ("#123", 0.58, 0.42, 0.68, 0.5)):
            ImageDraw.Draw(image).ellipse([corner + size * edge for edge in box], color)
        faces.append(TF.pil_to_tensor(image))
    return torch.stack(faces)

def is_picture(path):
    """Whether Pillow opens files of this ending, and no part of the relative path is hidden."""
    opens = Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN
    return opens and "/." not in f"/{path.as_posix()}"

def list_files(source):
    """Yield (path, stamp, reader) for each file in a folder or .zip; stamp: size, time or CRC."""
    if source.is_dir():
        for file in filter(Path.is_file, source.rglob("*")):
            stat = file.stat()
            yield file.relative_to(source), (stat.st_size, stat.st_mtime_ns), file.read_bytes
        return
    try:
        archive = ZipFile(source)
    except (OSError, BadZipFile) as error:
        raise UserError(f"{source} is neither a folder nor a readable .zip ({error}); {DATA_HELP}")
    for info in archive.infolist():
        if not info.is_dir():
            yield (PurePosixPath(info.filename), (info.file_size, info.CRC),
                   partial(archive.read, info))

def download_celeba(archive):
    """Fetch CelebA's aligned faces, 1.4 GB, from the first source that has them: all or nothing."""
    for url in CELEBA_URLS:
        try:
            with atomic_write(archive) as unfinished:
                return download_url(url, unfinished.parent, unfinished.name, CELEBA_MD5)
        except Exception as error:      # gdown, the network and the disk fail in many ways
            tqdm.write(f"no CelebA from {url}: {error}", sys.stderr)
    raise UserError(f"no source of CelebA could be used; {DATA_HELP}")

def find_pictures(path):
    """List the pictures by path; CelebA is downloaded, and all of it cut to its training part."""
    archive = path / CELEBA_ZIP
    if path == CELEBA_FOLDER and not archive.exists() and not any(map(is_picture, path.rglob("*"))):
        download_celeba(archive)
    files = sorted(list_files(archive if archive.exists() else path), key=itemgetter(0))
    pictures = [file for file in files if is_picture(file[0])]
    if LOCAL_RANK == 0:
        print(f"{path}: {len(pictures)} pictures, passed over {len(files) - len(pictures)} files")
    return pictures[:162_770] if len(pictures) == 202_599 else pictures     # 202,599: all of CelebA

def decode(data, image_size=64, crop=None):
    """An encoded picture (bytes) -> its centred square of `crop` pixels, resized: RGB (PIL).
    By default the lecture's 160 pixels of a picture of CelebA's size, else the largest square."""
    picture = Image.open(BytesIO(data))
    with suppress(Exception):       # malformed EXIF: the picture stays as it lies
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16"):     # Pillow would clip all above 255 to white
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    side = crop or (160 if picture.size == (178, 218) else min(picture.size))
    picture = TF.center_crop(picture, min(side, *picture.size)).convert("RGB")
    return TF.resize(picture, image_size)

def write_cache(cache, pictures, image_size, crop):
    """Write these pictures as RGB bytes, one after another; UserError if none can be read."""
    skipped = []
    def prepare(path, stamp, read):
        try:
            return decode(read(), image_size, crop).tobytes()
        except Exception as error:      # a broken picture may raise anything
            skipped.append(f"skipped {path}: {error}")
            return b""

    with atomic_write(cache) as unfinished, open(unfinished, "wb") as file, ThreadPool() as pool:
        for i in tqdm(range(0, len(pictures), 1000), "preparing, in thousands", disable=None):
            file.writelines(pool.starmap(prepare, pictures[i:i + 1000]))
        skipped[10:] = [f"skipped {len(skipped)} of {len(pictures)} pictures"]  # after ten of them
        tqdm.write("\n".join(skipped), sys.stderr)
        if not file.tell():
            raise UserError(f"no picture can be read; {skipped[0]}; {DATA_HELP}")
        file.write(b"\0")      # load_images looks for this byte: a truncated file has none

def load_images(path, image_size=64, crop=None):
    """A folder, a .zip or "toy" as one tensor: uint8, N x 3 x image_size x image_size.
    It is mapped from a file in data/, so it may be larger than memory, and writing into it changes
    the file. Delete that file after a change to decode. UserError if no picture can be read."""
    if str(path) == "toy":
        return toy_faces(image_size=image_size)
    pictures = find_pictures(Path(path))
    key = ascii([image_size, crop, *[picture[:2] for picture in pictures]])     # paths, stamps
    cache = Path("data", f"{uuid5(NAMESPACE_URL, key)}.dcgan")
    if not cache.exists() or cache.stat().st_size % (image_size**2 * 3) != 1:
        write_cache(cache, pictures, image_size, crop)
    size = cache.stat().st_size     # below, shared: a private mapping would have to fit into memory
    pixels = torch.from_file(str(cache), shared=True, size=size - 1, dtype=torch.uint8)
    return pixels.unflatten(0, (-1, image_size, image_size, 3)).permute(0, 3, 1, 2)

def batches(images, batch_size, epochs=1, seed=42, done=0, device=None, rank=0, ranks=1):
    """uint8 images N x C x S x S -> the batches after the first `done`, float in [-1, 1].
    The seed decides the order, another one in each epoch; an incomplete last batch is dropped. Of
    several processes (ranks), each gets its share of every batch."""
    epoch_steps = len(images) // batch_size
    for epoch in range(1 + done // epoch_steps, epochs + 1):
        rng = torch.Generator().manual_seed(seed_of("order", seed, epoch))
        order = torch.randperm(len(images), generator=rng).to(images.device)
        for index in order.split(batch_size)[done % epoch_steps:epoch_steps]:
            batch = images[index[rank::ranks]].to(device) / 127.5 - 1
            yield batch.contiguous(memory_format=torch.channels_last)
        done = 0        # the next epoch starts with its first batch

# ---- Pictures out: sample, measure, plot, animate ------------------------------------------------
@torch.no_grad()
def sample(G, latents):
    """Latents N x latent_dim -> uint8 N x channels x S x S, on the CPU; G must be in eval mode."""
    device = next(G.parameters()).device
    return torch.cat([(G(part.to(device)) * 127.5 + 127.5).round().byte().cpu()
                      for part in latents.split(128)])

def compare(fake, real):
    """uint8 images, N x C x S x S -> Frechet distance (lower is better), diversity (1 is healthy).
    The distance is FID's (Heusel et al. 2017, arXiv:1706.08500), between normal distributions with
    the means and covariances of both sets, but of pixels projected onto random vectors instead of
    Inception's features. Diversity is the mean distance of two fakes over that of two reals."""
    def project(images):        # onto 128 fixed random unit vectors
        rng = torch.Generator().manual_seed(0)
        vectors = F.normalize(torch.randn(images[0].numel(), 128, generator=rng), dim=0)
        return (images.flatten(1) / 127.5 @ vectors).double()

    fake, real = project(fake), project(real)
    # |m - n|^2 + trace(A + B - 2 sqrt(A B)); the trace of a root: the sum of the eigenvalues' roots
    eigenvalues = torch.linalg.eigvals(fake.T.cov() @ real.T.cov())
    gap = (fake.mean(0) - real.mean(0)).square()
    distance = (gap + fake.var(0) + real.var(0)).sum() - 2 * eigenvalues.sqrt().real.sum()
    return distance.item(), (torch.pdist(fake).mean() / torch.pdist(real).mean()).item()

def plot_losses(losses, epochs, path):
    """Draw loss_d and loss_g (steps x 2) over epochs, each as 200 means."""
    image = Image.new("RGB", (480, 270), "white")
    draw = ImageDraw.Draw(image)
    means = F.adaptive_avg_pool1d(losses.T, 200)
    low, high = means.min(), means.quantile(0.97)       # early peaks may leave the picture
    y = 240 - 200 * (means - low) / (high - low + 1e-9)
    x = torch.linspace(40, 460, 200).tolist()
    for curve, color in zip(y.tolist(), ("#1f5fa8", "#d2691e")):
        draw.line(list(zip(x, curve)), color)
    draw.text((40, 10), "discriminator loss: blue, generator loss: orange", "black")
    for part in 0, 0.5, 1:      # of both axes
        draw.text((5, 235 - 200 * part), f"{low + (high - low) * part:.2g}", "black")
        draw.text((40 + 380 * part, 250), f"epoch {epochs * part:g}", "black")
    image.save(path)

def animate(folder, epochs, path):
    """Make a GIF of the grids of epochs 1 to `epochs` in `folder`; missing ones are left out."""
    grids = [folder / f"epoch_{epoch:03d}.png" for epoch in range(1, epochs + 1)]
    frames = map(Image.open, filter(Path.exists, grids))        # an iterator: few are open at once
    for first in frames:        # runs once: saving the first consumes the rest
        first.save(path, save_all=True, append_images=frames, duration=500, loop=0)

# ---- Devices, and several processes in torchrun --------------------------------------------------
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}    # to join by NCCL alone waits for nobody

def find_device(name, precision):
    """Return the device, in torchrun each process's own for "cuda", and whether to use bfloat16."""
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.zeros(1, device=name).device     # raises if it cannot be used
    except Exception as error:      # each kind of device has errors of its own
        raise UserError(f"--device {name} cannot be used: {error}; try --device cpu")
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
              else torch.cpu._is_avx512_bf16_supported())       # false on Macs with mps
    return device, native if precision == "auto" else precision == "bf16"

def average_gradient(parameter):
    """Average its gradient over all processes: as a hook, so that train_step need not know."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= RANKS

# ---- The run -------------------------------------------------------------------------------------
def find_troubles(rows, highest_d_fake):
    """Yield what is wrong after the latest epoch; `rows` are those of log.csv, one per epoch."""
    latest, best = rows[-1], min(rows, key=itemgetter("frechet"))
    if latest["step"] > 300 and latest["diversity"] < 0.5:      # early on, all fakes are alike
        yield "the generator collapses; try lower, equal --lr-g and --lr-d, or a lower --beta1"
    if highest_d_fake < 0.05:       # of all D(G(z)): D spots each fake. Other losses may lack it
        yield "the discriminator has won; try a lower --lr-d or a higher --lr-g"
    if min(row["frechet"] for row in rows[-5:]) > 1.1 * best["frechet"]:    # all five are worse
        yield f"past its best, epoch {best['epoch']}, kept in best.pt"

class Run:
    """All training state. A checkpoint holds each attribute, or its state_dict() if it has one."""

    def __init__(self, args, images, device):
        torch.manual_seed(args.seed)
        self.config = dict(latent_dim=LATENT_DIM, channels=images.shape[1], width=args.width,
                           image_size=args.image_size, slope=args.slope_g)
        self.G = Generator(**self.config)
        self.D = Discriminator(images.shape[1], args.width, args.image_size)
        for network in self.G, self.D:
            network.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.G).eval()     # the moving average of G: it draws all pictures
        adam = partial(torch.optim.Adam, betas=(args.beta1, 0.999), fused=True)
        self.optimizer_g = adam(self.G.parameters(), args.lr_g)
        optimizers = {"adam": adam, "sgd": torch.optim.SGD}
        self.optimizer_d = optimizers[args.optimizer_d](self.D.parameters(), args.lr_d)
        self.fixed_noise = torch.randn(1024, LATENT_DIM)
        self.pictures = len(images)         # how many there are
        self.epoch_steps = self.pictures // args.batch_size
        self.step = 0                                       # steps that are done
        self.losses = torch.empty(0, 4)         # of each step: loss_d, loss_g, D(x), D(G(z))
        self.rows = []                                      # of log.csv, one an epoch
        self.settings = {name: value for name, value in vars(args).items()
                         if name not in ("out", "resume", "generate")}

    def save(self, path):
        """Write every attribute, by way of memory: on a full disk, torch.save raises no OSError."""
        state = {name: value.state_dict() if hasattr(value, "state_dict") else value
                 for name, value in vars(self).items()}
        buffer = BytesIO()
        torch.save(state, buffer)
        with atomic_write(path) as unfinished:
            unfinished.write_bytes(buffer.getbuffer())

    def make_row(self, *numbers):
        """Epoch, step and these four or six numbers by name, to four significant digits."""
        names = "epoch", "step", "loss_d", "loss_g", "D(x)", "D(G(z))", "frechet", "diversity"
        epoch = 1 + (self.step - 1) // self.epoch_steps
        return dict(zip(names, [epoch, self.step, *(float(f"{number:.4g}") for number in numbers)]))

    def load(self, state):
        state["settings"] = self.settings       # keep this call's: some may differ from the saved
        for name, value in vars(self).items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])

def end_epoch(run, real, out):
    """Draw and measure the average's fakes, write log.csv, keep the best epoch; return troubles."""
    fakes, losses = sample(run.ema, run.fixed_noise), run.losses.cpu()
    row = run.make_row(*losses[-run.epoch_steps:].mean(0), *compare(fakes, real))
    run.rows.append(row)
    save_image(fakes[:64] / 255, out / "samples" / f"epoch_{row['epoch']:03d}.png")
    plot_losses(losses[:, :2], row["epoch"], out / "losses.png")
    with open(out / "log.csv", "w") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(run.rows)
    if row is min(run.rows, key=itemgetter("frechet")):         # of equal ones, the first
        run.save(out / "best.pt")
    return find_troubles(run.rows, losses[-run.epoch_steps:, 3].max())      # 3: D(G(z))

def end_step(run, real, args, signals):
    """Save at an epoch's end or at a signal, which ends the run; print also at --log-interval."""
    epoch_ended = run.step % run.epoch_steps == 0
    if run.step % args.log_interval and not (epoch_ended or signals):
        return
    values = run.losses, *run.G.parameters(), *run.D.parameters()
    if not nn.utils.get_total_norm(values).isfinite():      # one norm of all: one wait for a GPU
        raise UserError(f"a loss or weight is not finite at step {run.step}, which is not saved; "
                        "try lower --lr-g and --lr-d in a new --out")
    troubles = end_epoch(run, real, args.out) if epoch_ended else ()
    if epoch_ended or signals:      # last of the files: killed before it, the epoch is run again
        run.save(args.out / "checkpoint.pt")
    if signals:
        tqdm.write(f"stopped after step {run.step}: go on with --resume", sys.stderr)
        raise SystemExit(128 + signals[0])
    # last of all, as printing may raise: in `dcgan.py | tee log`, Ctrl-C ends tee, too
    row = run.rows[-1] if epoch_ended else run.make_row(*run.losses[-1])
    tqdm.write(" ".join(f"{name} {number}" for name, number in row.items()))
    for trouble in troubles:
        tqdm.write(f"warning: {trouble}")

@contextmanager
def stop_signals():
    """Yield a list that gets the first Ctrl-C or SIGTERM; the second raises KeyboardInterrupt."""
    received = []
    def remember(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    replaced = {number: signal.signal(number, remember)         # it returns the old handler
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)

def start(args, device, saved):
    """Return the pictures and a Run, new or as saved. In torchrun, the processes meet here."""
    if not saved and (args.out / "checkpoint.pt").exists():
        raise UserError(f"--out {args.out} holds a run: --resume it, or choose another --out")
    join = partial(dist.init_process_group, BACKENDS.get(device.type), timeout=timedelta(days=1))
    if LOCAL_RANK > 0:
        join()      # waits for all: this machine's first process prepares the pictures, then joins
    images = load_images(args.data, args.image_size, args.crop)
    if RANKS > 1 and LOCAL_RANK == 0:
        join()
    found = f"--data {args.data} has {len(images)} readable pictures"
    if len(images) < args.batch_size:
        raise UserError(f"{found}, fewer than --batch-size {args.batch_size}")
    if saved and saved["pictures"] != len(images):
        raise UserError(f"{found}, but the run began with {saved['pictures']}")
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    run = Run(args, images, device)
    if saved:
        run.load(saved)
    return images, run

def train(args, device, bf16, saved):
    """Train into args.out, from a checkpoint if there is one; in torchrun, as one of the ranks."""
    images, run = start(args, device, saved)
    real = images[::len(images) // 1024 + 1].cpu()      # 1,024 of them at most, to compare with
    if RANK == 0:
        (args.out / "samples").mkdir(parents=True, exist_ok=True)
        save_image(real[:64] / 255, args.out / "real.png")
        print(f"{len(images):,} pictures; {device}, {'bf16' if bf16 else 'fp32'}; see {args.out}")
    if RANKS > 1:
        for parameter in (*run.G.parameters(), *run.D.parameters()):
            parameter.register_post_accumulate_grad_hook(average_gradient)
    torch.backends.cudnn.benchmark = True       # all batches have one shape: tuning pays
    source = batches(images, args.batch_size, args.epochs, args.seed, run.step, device, RANK, RANKS)
    with stop_signals() as signals:
        for batch in tqdm(source, total=run.epoch_steps * args.epochs, initial=run.step,
                          disable=RANK > 0 or None):        # None: no bar unless in a terminal
            run.step += 1
            # decided by seed, step and rank alone, so that a resumed run draws the same noise
            rng = torch.Generator(device).manual_seed(seed_of("noise", args.seed, run.step, RANK))
            losses = train_step(run.G, run.D, run.optimizer_g, run.optimizer_d, batch, bf16=bf16,
                                fresh_noise=args.fresh_noise, flip_labels=args.flip_labels, rng=rng)
            update_average(run.ema, run.G, args.ema, run.step)
            run.losses = torch.cat([run.losses.to(device), losses[None]])   # no wait for a GPU
            if RANK == 0:       # the others hold the same weights, but own batch statistics
                end_step(run, real, args, signals[:])       # a copy: no signal midway counts
    if RANK == 0:
        animate(args.out / "samples", len(run.rows), args.out / "samples.gif")
    if RANKS > 1:
        dist.destroy_process_group()        # in no finally: NCCL may hang after one rank's error

def generate(saved, count, out, seed, device):
    """Write `count` pictures of a saved generator into out/generated, a grid of 64, and walk.png.
    Each row of walk.png goes straight from one latent to another: gradual changes speak for
    learning, sudden ones for memorising (Radford et al. 2016, section 6.1)."""
    G = Generator(**saved["config"]).to(device).eval()
    G.load_state_dict(saved["ema"])
    torch.manual_seed(seed)
    noise = torch.randn(16 + count, saved["config"]["latent_dim"])      # 16: ends of eight walks
    walk = [a.lerp(b, i / 7) for a, b in zip(noise[:8], noise[8:16]) for i in range(8)]
    save_image(sample(G, torch.stack(walk)) / 255, out / "walk.png")
    save_image(sample(G, noise[16:80]) / 255, out / "generated.png")
    folder = out / "generated"
    folder.mkdir(exist_ok=True)
    for file in folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9].png"):      # left by an earlier call
        file.unlink()
    for i, latent in enumerate(tqdm(noise[16:], "generating", disable=None), 1):
        save_image(sample(G, latent[None]) / 255, folder / f"{i:06d}.png")
    print(f"epoch {saved['rows'][-1]['epoch']}: {count} pictures in {folder} and {folder}.png")

# ---- The command line ----------------------------------------------------------------------------
def parse_args(argv, settings=None):
    """Return the command line as a namespace; a checkpoint's `settings` replace the defaults."""
    def between(kind, low, high=2**32 - 1):
        def number(text):       # argparse says: invalid number value: 'abc'
            if low <= kind(text) <= high:
                return kind(text)
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return number
    natural, share = between(int, 1), between(float, 0, 1)
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    def flag(name, kind, default, text, **options):
        parser.add_argument(name, type=kind, default=default, help=text, **options)
    flag("--data", str, str(CELEBA_FOLDER), "folder or .zip of pictures, or toy")
    flag("--image-size", int, 64, "in pixels", choices=WIDTHS)
    flag("--crop", natural, None, "pixels of the centre crop (160 for CelebA, else the largest)")
    flag("--width", natural, 64, "channels at half the image size")
    flag("--slope-g", share, 0.2, "of the generator's LeakyReLU; 0 is ReLU")
    flag("--ema", share, 0.999, "decay of the generator's moving average")
    flag("--epochs", natural, 20, "passes over the pictures")
    flag("--batch-size", between(int, 2), 128, "images a step")
    flag("--lr-g", share, 4e-4, "generator's learning rate (the paper: 2e-4)")
    flag("--lr-d", share, 4e-4, "discriminator's learning rate (the paper: 2e-4)")
    flag("--beta1", between(float, 0, 0.999), 0.25, "of Adam (the paper: 0.5)")
    flag("--optimizer-d", str, "adam", "of the discriminator", choices=("adam", "sgd"))
    flag("--flip-labels", share, 0.0, "share of the discriminator's labels to swap")
    flag("--out", Path, "out", "folder for everything that the run makes")
    flag("--generate", natural, None, "draw this many pictures with the run's best epoch")
    flag("--seed", between(int, 0), 42, "random seed")
    flag("--device", str, str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
         "cpu, cuda, cuda:1, mps, ...")
    flag("--precision", str, "auto", "auto: bf16 if native", choices=("auto", "bf16", "fp32"))
    flag("--log-interval", natural, 100, "steps between printed lines")
    parser.add_argument("--fresh-noise", action="store_true", help="G's half gets noise of its own")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args(argv, argparse.Namespace(**settings or {}))

def read_checkpoint(argv, args):
    """Parse again with a checkpoint's settings as defaults; return that and the checkpoint."""
    path = args.out / ("best.pt" if args.generate else "checkpoint.pt")
    try:
        saved = torch.load(path, "cpu", weights_only=True)
        settings = saved["config"] and saved["settings"]    # either may be missing in an old file
    except Exception as error:
        raise UserError(f"{path} cannot be read, train first or check --out: {error!r:.200}")
    args = parse_args(argv, settings)       # a resumed run may change these five only:
    for name in settings.keys() - {"data", "epochs", "device", "precision", "log_interval"}:
        if args.resume and getattr(args, name) != settings[name]:
            raise UserError(f"this run has --{name.replace('_', '-')} {settings[name]}")
    return args, saved

def main(argv=None):
    """Train or generate. What the user can fix is one line on standard error and status 1."""
    args, saved = parse_args(argv), None
    try:
        if args.resume or args.generate:
            args, saved = read_checkpoint(argv, args)
        device, bf16 = find_device(args.device, args.precision)
        if args.batch_size % RANKS:
            raise UserError(f"{RANKS} processes cannot share --batch-size {args.batch_size} evenly")
        if not args.generate:
            train(args, device, bf16, saved)
        elif RANK == 0:
            generate(saved, args.generate, args.out, args.seed, device)
    except (UserError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        raise SystemExit(f"dcgan.py: error: {' '.join(str(error).split()) or 'interrupted'}")

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")       # for pipes; for odd names
    main()
