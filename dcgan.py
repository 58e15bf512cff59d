# SPDX-License-Identifier: MIT
"""DCGAN in one file: train it on pictures of faces, get faces of people who never were.

    python dcgan.py --data toy --epochs 3       drawn faces, no download
    python dcgan.py --epochs 20                 CelebA, as in the lecture
    python dcgan.py --generate 1000             pictures from the checkpoint in out/

Two cores with AVX512-BF16 train 107 to 133 images a second. Sources: Radford et al. 2016,
arXiv:1511.06434; Raschka 2021, STAT 453, lecture 18.6; Chintala et al. 2016, ganhacks; Liu 2015.
"""
import argparse
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed as dist, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import datasets, io
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

# ---- Data: from a path to one uint8 tensor, from that tensor to a batch in [-1, 1] ---------------
CELEBA_FOLDER = Path("data/celeba")
CELEBA_ID, CELEBA_MD5, CELEBA_ZIP = datasets.CelebA.file_list[0]
CELEBA_PICTURES, CELEBA_TRAIN = 202_599, 162_770    # all of them; the official training partition
CELEBA_SIZE, CELEBA_CROP = (178, 218), 160          # width x height; the lecture's centre crop
CELEBA_HELP = f"put {CELEBA_ZIP} into {CELEBA_FOLDER} by hand, or use --data toy or --data FOLDER"

class UserError(Exception):
    """Something the user can mend: main prints it as one line and exits with status 2."""

def toy_faces(count=4096, image_size=64):
    """Draw simple faces, all different: uint8, count x 3 x image_size x image_size."""
    rng, axis = torch.Generator().manual_seed(0), torch.linspace(-1, 1, 64)
    def rand(low, high, channels=1):
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=rng)
    images, tan, eye = rand(90, 210, 3).repeat(1, 1, 64, 64), rand(0, 120), rand(0.3, 0.45)
    head, head_x, head_y = rand(0.55, 0.75), rand(-0.1, 0.1), rand(-0.05, 0.1)
    for color, x, y, width, height in (     # hair, skin, mouth and eyes, in units of the head
            (rand(20, 120, 3), 0, -0.2, rand(0.9, 1.1), rand(1.05, 1.25)),
            (torch.cat([240 - tan, 190 - tan, 150 - tan], 1), 0, 0.05, rand(0.7, 0.85), 1),
            (torch.cat([250 - tan, tan, tan], 1), 0, 0.5, rand(0.2, 0.5), rand(0.06, 0.16)),
            (rand(0, 90, 3), eye, -0.2, 0.13, 0.1), (rand(0, 90, 3), -eye, -0.2, 0.13, 0.1)):
        u, v = ((axis - head_x) / head - x) / width, ((axis[:, None] - head_y) / head - y) / height
        images.lerp_(color, ((1 - u**2 - v**2) * 4 * width).clamp(0, 1))       # softens the rim
    return F.interpolate(images.byte(), (image_size, image_size), mode="bilinear", antialias=True)

def find_pictures(path):
    """Resolve --data: (folder or .zip, sorted names of the pictures in it); may download CelebA."""
    if path.is_dir() or path == CELEBA_FOLDER:
        names = [os.path.join(folder, file)[len(str(path)) + 1:]
                 for folder, _, files in os.walk(path, followlinks=True) for file in files]
    elif is_zipfile(path):
        names = ZipFile(path).namelist()
    else:
        html = path.is_file() and path.open("rb").read(512).lstrip().startswith(b"<")
        what = "a web page" if html else "cut off, or no .zip" if path.exists() else "not there"
        raise UserError(f"{path} is {what}; {CELEBA_HELP}")
    names = sorted((name for name in names if name.lower().endswith(datasets.folder.IMG_EXTENSIONS)
                    and "/." not in f"/{name}"), key=lambda name: (os.path.basename(name), name))
    if len(names) == CELEBA_PICTURES and Path(names[-1]).stem == f"{CELEBA_PICTURES:06d}":
        names = names[:CELEBA_TRAIN]
    archive = path / CELEBA_ZIP
    if not names and path == CELEBA_FOLDER and not archive.exists():
        download_celeba(path)
    return find_pictures(archive) if not names and archive.exists() else (path, names)

def download_celeba(folder):
    """Fetch CelebA's archive of aligned faces, 1.4 GB, into `folder`: all of it or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as partial:
            archive = Path(partial, CELEBA_ZIP)
            datasets.utils.download_file_from_google_drive(CELEBA_ID, partial, CELEBA_ZIP)
            find_pictures(archive)      # says so if what came is no .zip at all
            if not datasets.utils.check_integrity(archive, CELEBA_MD5):
                raise UserError(f"its MD5 is not {CELEBA_MD5}")
            os.replace(archive, folder / CELEBA_ZIP)
    except Exception as error:      # gdown, the network and the disk fail in many ways
        raise UserError(f"CelebA's download failed ({str(error).split('; put')[0]}); {CELEBA_HELP}")

def decode(data, image_size=64, crop=None):
    """An encoded picture (bytes) -> uint8 RGB, 3 x image_size x image_size, as in the lecture."""
    if data.startswith(b"\xff\xd8") and hasattr(io, "decode_jpeg"):     # as Pillow, but faster
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = io.decode_jpeg(encoded, "RGB", apply_exif_orientation=True)
    else:
        picture = ImageOps.exif_transpose(Image.open(BytesIO(data)))
        if picture.mode.startswith("I"):        # 16 bit: Pillow would clip all above 255 to white
            picture = picture.convert("I").point(lambda value: value / 256).convert("L")
        image = pil_to_tensor(picture.convert("RGB"))
    height, width = image.shape[1:]         # centre crop: 160 for CelebA, else the largest square
    side = min(height, width, crop or (CELEBA_CROP if (width, height) == CELEBA_SIZE else width))
    top, left = (height - side) // 2, (width - side) // 2
    square = image[None, :, top:top + side, left:left + side]
    return F.interpolate(square, (image_size, image_size), mode="bilinear", antialias=True)[0]

def report(line, end=True):
    """Print a line; on a terminal, cut to its width and written over unless it is an end."""
    if sys.stdout.isatty() and not end:
        line = f"{line[:os.get_terminal_size().columns - 1]}\033[K\r"
    print(line, end="" if line.endswith("\r") else "\n", flush=True)

def save_atomically(content, path):
    """torch.save that leaves either the old file or the whole new one, whatever happens."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as partial:
        torch.save(content, f"{partial}/new")
        os.replace(f"{partial}/new", path)

def load_images(path, image_size=64, crop=None):
    """A folder, a .zip or "toy" as one tensor, uint8, N x 3 x image_size x image_size, cached."""
    if str(path) == "toy":
        return toy_faces(image_size=image_size)
    source, names = find_pictures(Path(path))
    stats = map(os.lstat, [f"{source}/{name}" for name in names] if source.is_dir() else [source])
    key = repr((image_size, crop, names, [(stat.st_size, stat.st_mtime_ns) for stat in stats]))
    cache = Path(f"{os.path.abspath(source)}.dcgan.pt")
    with suppress(Exception):       # absent, damaged or something else
        saved = torch.load(cache, mmap=True, weights_only=True)
        if saved["key"] == key:
            return saved["images"]
    read = ZipFile(source).read if source.is_file() else lambda name: (source / name).read_bytes()
    def try_decode(name):
        try:
            return decode(read(name), image_size, crop)
        except Exception as error:      # a broken picture may raise anything
            print(f"skipped {source / name}: {' '.join(str(error).split())}", file=sys.stderr)
    images = torch.empty(len(names), 3, image_size, image_size, dtype=torch.uint8)
    count, start = 0, time.time()
    with ThreadPool() as pool:
        for done, image in enumerate(pool.imap(try_decode, names, chunksize=32), 1):
            if image is not None:
                images[count] = image
                count += 1
            if done % (len(names) // 20 + 500) == 0 or done == len(names):
                left = (time.time() - start) * (len(names) / done - 1)
                report(f"decoded {done:,} of {len(names):,}, {left:.0f} s left", done == len(names))
    try:
        save_atomically({"key": key, "images": images[:count]}, cache)
    except (OSError, RuntimeError) as error:
        print(f"no cache, the next start decodes again: {error}", file=sys.stderr)
    return images[:count]

def to_batch(images, index, device="cpu", flip=False, rng=None):
    """Rows `index` of a uint8 tensor -> float batch in [-1, 1] on `device`; `flip` mirrors half."""
    batch = images[index.to(images.device)].to(device) / 127.5 - 1
    if flip:
        mirror = torch.rand(len(batch), 1, 1, 1, device=device, generator=rng) < 0.5
        batch = torch.where(mirror, batch.flip(3), batch)
    return batch.contiguous(memory_format=torch.channels_last)

# ---- Networks (Radford et al. 2016, section 3): channels double as the side halves, to 8 * width -
LATENT_DIM, LEAKY_SLOPE = 100, 0.2

def init_weights(module):
    """Normal weights of deviation 0.02, batch norm's around 1 (Radford et al. 2016, section 4)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)

class Generator(nn.Sequential):
    """Latents N x latent_dim -> images N x channels x image_size x image_size in [-1, 1]."""
    def __init__(self, latent_dim=LATENT_DIM, channels=3, width=64, image_size=64, relu=False):
        widths = [width * min(2**i, 8) for i in range(image_size.bit_length() - 3)][::-1]
        layers = [nn.Unflatten(1, (latent_dim, 1, 1))]         # at the defaults, 100 x  1 x  1
        for inputs, outputs in zip([latent_dim, *widths], widths):              # 512 x  4 x  4
            stride, padding = (2, 1) if len(layers) > 1 else (1, 0)             # 256 x  8 x  8
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False),
                       nn.BatchNorm2d(outputs),                                 # 128 x 16 x 16
                       nn.ReLU(True) if relu else nn.LeakyReLU(LEAKY_SLOPE, True)]  # 64 x 32 x 32
        super().__init__(*layers, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh())
        self.apply(init_weights)                                                # 3 x 64 x 64

class Discriminator(nn.Sequential):
    """Images N x channels x image_size x image_size in [-1, 1] -> logits N x 1, positive: real."""
    def __init__(self, channels=3, width=64, image_size=64):
        widths = [width * min(2**i, 8) for i in range(image_size.bit_length() - 3)]
        layers = []                                            # at the defaults,   3 x 64 x 64
        for inputs, outputs in zip([channels, *widths], widths):                #  64 x 32 x 32
            norm = [nn.BatchNorm2d(outputs)] if layers else []                  # 128 x 16 x 16
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=not norm),      # 256 x  8 x  8
                       *norm, nn.LeakyReLU(LEAKY_SLOPE, True)]                  # 512 x  4 x  4
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4), nn.Flatten())    #   1
        self.apply(init_weights)

# ---- The step: one round of the game (Goodfellow et al. 2014; lecture 18.6) ----------------------
def train_step(G, D, optimizer_g, optimizer_d, real, latent_dim=LATENT_DIM, *, bf16=False,
               fresh_noise=False, label_smoothing=0.0, flip_labels=0.0, rng=None):
    """Update D, then G, on one batch of real images, N x channels x S x S in [-1, 1].

    G maps latents N x latent_dim to images, D images to logits N x 1, both in autocast if `bf16`.
    Returns loss_d, loss_g and the means of D(x) and D(G(z)) as a tensor of four, on the device."""
    n, device, bce = len(real), real.device, F.binary_cross_entropy_with_logits
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    swapped = torch.rand(2, n, 1, device=device, generator=rng) < flip_labels
    real_labels = torch.where(swapped[0], 0.0, 1.0 - label_smoothing)       # one-sided
    fake_labels = torch.where(swapped[1], 1.0 - label_smoothing, 0.0)

    # Discriminator: maximise log D(x) + log(1 - D(G(z))); one batch each, for batch norm's sake
    with autocast:
        fake = G(torch.randn(n, latent_dim, device=device, generator=rng))
        real_logits, fake_logits = D(real).float(), D(fake.detach()).float()
    loss_d = (bce(real_logits, real_labels) + bce(fake_logits, fake_labels)) / 2
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()

    # Generator: maximise log D(G(z)), the non-saturating loss; D only passes the gradient on
    D.requires_grad_(False)
    with autocast:
        if fresh_noise:
            fake = G(torch.randn(n, latent_dim, device=device, generator=rng))
        logits = D(fake).float()
    loss_g = bce(logits, torch.ones_like(logits))
    optimizer_g.zero_grad()
    loss_g.backward()
    optimizer_g.step()
    D.requires_grad_(True)
    scores = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
    return torch.stack([loss_d, loss_g, *scores]).detach()

# ---- The run: measures, epochs, checkpoints ------------------------------------------------------
@torch.no_grad()
def sample(G, latents):
    """Latents N x latent_dim -> uint8 N x channels x S x S, on the CPU; G in eval mode."""
    return torch.cat([(G(z) * 127.5 + 127.5).round().byte().cpu() for z in latents.split(128)])

def compare(fake, real):
    """uint8 images -> sliced Wasserstein distance * 1000 (Rabin et al. 2011) and diversity."""
    fake, real = (torch.cat([F.adaptive_avg_pool2d(some / 127.5 - 1, 16).flatten(1)
                             for some in images.split(128)]) for images in (fake, real))
    n, rng = min(len(fake), len(real)), torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(fake.shape[1], 256, generator=rng), dim=0)
    gaps = (fake[:n] @ directions).sort(0).values - (real[:n] @ directions).sort(0).values
    return 1000 * gaps.abs().mean(), torch.pdist(fake).mean() / torch.pdist(real).mean()

def train(args, checkpoint=None):
    """Train as the flags say, from a checkpoint if given, into args.out; in torchrun, as a rank."""
    out, device, n = Path(args.out), torch.device(args.device), args.batch_size
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank > 0:        # waits here until rank 0 has prepared the pictures
        dist.init_process_group("gloo")
    if n % ranks or ranks > 1 and device.type != "cpu":
        raise UserError(f"{ranks} processes share --batch-size {n} evenly, on --device cpu only")
    if not checkpoint and (out / "checkpoint.pt").exists():
        raise UserError(f"--out {out} holds a run: go on with --resume, or choose another --out")
    images = load_images(args.data, args.image_size, args.crop)
    needed = checkpoint["pictures"] if checkpoint else max(n, len(images))      # at least a batch
    if len(images) != needed:
        raise UserError(f"--data {args.data}: {len(images)} readable pictures, {needed} are needed")
    if ranks > 1 and rank == 0:
        dist.init_process_group("gloo")
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
              device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"))
    precision = args.precision if args.precision != "auto" else "bf16" if native else "fp32"
    epoch_steps, epochs = (1, 1) if args.dry_run else (len(images) // n, args.epochs)
    torch.manual_seed(args.seed)
    G = Generator(width=args.width, image_size=args.image_size, relu=args.activation == "relu")
    D = Discriminator(width=args.width, image_size=args.image_size)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    for p in (*G.parameters(), *D.parameters()) if ranks > 1 else ():   # share the gradients
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, dist.ReduceOp.AVG))
    optimizer_g = torch.optim.Adam(G.parameters(), args.lr_g, (args.beta1, 0.999), fused=True)
    optimizer_d = (torch.optim.SGD(D.parameters(), args.lr_d) if args.optimizer_d == "sgd" else
                   torch.optim.Adam(D.parameters(), args.lr_d, (args.beta1, 0.999), fused=True))
    ema = AveragedModel(G, use_buffers=True).eval()
    parts = {"generator": G, "discriminator": D, "ema": ema,
             "optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
    rng, fixed_rng = (torch.Generator(d).manual_seed(args.seed) for d in (device, "cpu"))
    log = ["epoch,step,loss_d,loss_g,D(x),D(G(z)),swd,diversity"]
    first, history, recent, stop = 0, torch.empty(0, 4), [], []
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        rng.set_state(checkpoint["rng"])
        first, history, log = checkpoint["step"], checkpoint["history"], checkpoint["log"]
    if rank > 0:
        rng.manual_seed(args.seed + first + rank)       # noise of its own
    options = {"bf16": precision == "bf16", "fresh_noise": args.fresh_noise, "rng": rng,
               "label_smoothing": args.label_smoothing, "flip_labels": args.flip_labels}
    sizes = " + ".join(f"{sum(p.numel() for p in net.parameters()):,}" for net in (G, D))
    latents = torch.randn(1024, LATENT_DIM, generator=fixed_rng).to(device)
    real = images[torch.randperm(len(images), generator=fixed_rng)[:1024].to(images.device)].cpu()
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if rank == 0:
        report(f"{args.data}: {len(images):,} pictures; {device}, {precision}; {sizes} parameters")
        save_image(real[:64] / 255, out / "real.png")
    for signum in (signal.SIGINT, signal.SIGTERM):      # take effect between two steps
        signal.signal(signum, lambda signum, frame: stop.append(signum))
    start = shown = time.time()
    for step in range(first + 1, epochs * epoch_steps + 1):
        epoch, i = divmod(step - 1, epoch_steps)
        if i == 0 or step == first + 1:
            order = torch.randperm(len(images), generator=fixed_rng.manual_seed(args.seed + epoch))
        batch = to_batch(images, order[i * n:(i + 1) * n][rank::ranks], device, args.flip, rng)
        recent.append(train_step(G, D, optimizer_g, optimizer_d, batch, **options))
        ema.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, step / (9 + step)))       # warmed up
        ema.update_parameters(G)
        epoch_done, log_it = step % epoch_steps == 0, step % args.log_interval == 0
        if rank > 0 or not (epoch_done or log_it or stop):
            continue
        rows = torch.stack(recent).cpu()        # only here does the host wait for the device
        if not all(x.isfinite().all() for x in (rows, *G.parameters(), *D.parameters())):
            raise UserError(f"not finite at step {step}, checkpoint kept: lower --lr-g and --lr-d")
        history = torch.cat([history, rows])
        row = [epoch + 1, step, *rows[-1].tolist()]
        if epoch_done:
            fakes = sample(ema, latents)
            row += [x.item() for x in compare(fakes, real)]
            save_image(fakes[:64] / 255, out / "samples" / f"epoch_{epoch + 1:03d}.png")
            plot_losses(history[:, :2], epoch_steps, out / "losses.png")
        if epoch_done or log_it:
            log = [*log, ",".join(f"{round(value, 4)}" for value in row) + "," * (8 - len(row))]
            (out / "log.csv").write_text("\n".join(log) + "\n")
        speed, shown, recent = len(recent) * n / (time.time() - shown), time.time(), []
        left = (shown - start) / (step - first) * (epochs * epoch_steps - step)
        text = " ".join(f"{name} {round(x, 2)}" for name, x in zip(log[0].split(","), row))
        report(f"{text} {left:.0f} s left {speed:,.0f} images/s", epoch_done or stop)
        if epoch_done and step > 300 and row[-1] < 0.5:     # early on, all fakes are alike
            report("warning: the generator collapses; try --lr-g nearer --lr-d or a lower --beta1")
        if epoch_done and history[-epoch_steps:, 0].max() < 0.05:
            report("warning: the discriminator has won; try a lower --lr-d or --flip-labels 0.05")
        if (epoch_done or stop) and not args.dry_run:
            run_only = {"out", "resume", "generate", "device", "dry_run"}
            save_atomically({
                "settings": {k: v for k, v in vars(args).items() if k not in run_only}, "log": log,
                "pictures": len(images), "step": step, "history": history, "rng": rng.get_state(),
                **{name: part.state_dict() for name, part in parts.items()}}, out / "checkpoint.pt")
            if stop:
                report(f"stopped after step {step}: go on with --resume")
                raise SystemExit(128 + stop[0])
    if rank == 0:
        frame, *frames = map(Image.open, sorted(out.glob("samples/epoch_*.png")))
        frame.save(out / "samples.gif", save_all=True, append_images=frames, duration=500, loop=0)
        report(f"done in {time.time() - start:.0f} s: see {out}")

def generate(checkpoint, count, folder, seed=42, device="cpu"):
    """Write `count` pictures from a checkpoint into `folder`, and a grid of 64 beside it."""
    flags, folder, rng = checkpoint["settings"], Path(folder), torch.Generator().manual_seed(seed)
    sizes = {"width": flags["width"], "image_size": flags["image_size"]}
    ema = AveragedModel(Generator(**sizes, relu=flags["activation"] == "relu"), use_buffers=True)
    ema.load_state_dict(checkpoint["ema"])
    images = sample(ema.to(device).eval(), torch.randn(count, LATENT_DIM, generator=rng).to(device))
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*.png"):       # an earlier call's
        file.unlink()
    for i, image in enumerate(images, 1):
        save_image(image / 255, folder / f"{i:06d}.png")
    save_image(images[:64] / 255, f"{folder}.png")
    print(f"{count} pictures in {folder}, a grid in {folder}.png")

def plot_losses(losses, epoch_steps, path):
    """Draw loss_d and loss_g (steps x 2) over epochs as a PNG: faint per step, bold smoothed."""
    image, font, grey = Image.new("RGB", (1600, 900), "white"), ImageFont.load_default(28), "#444"
    draw, left, top, right, bottom = ImageDraw.Draw(image, "RGBA"), 110, 50, 1500, 830
    epochs, highest = len(losses) / epoch_steps, int(losses.quantile(0.995).item() + 0.1) + 1
    for k in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = left + k * (right - left), bottom - k * (bottom - top)
        draw.line([(left, y), (right, y)], "#ddd", 2)
        draw.line([(x, top), (x, bottom)], "#ddd", 2)
        draw.text((left - 15, y), f"{k * highest:.3g}", grey, font, "rm")
        draw.text((x, bottom + 18), f"epoch {k * epochs:.3g}", grey, font, "mt")
    window, xs = len(losses) // 100 * 2 + 1, torch.linspace(left, right, len(losses)).tolist()
    smooth = F.avg_pool1d(losses.T, window, 1, window // 2, count_include_pad=False).T
    for i, name, bold in ((0, "discriminator loss", "#1f5fa8"), (1, "generator loss", "#d2691e")):
        draw.text((right - 20, top + 40 * i + 30), name, bold, font, "rm")
        for values, color, thickness in ((losses[:, i], bold + "60", 2), (smooth[:, i], bold, 5)):
            ys = bottom - (values / highest).clamp(max=1) * (bottom - top)
            draw.line(list(zip(xs, ys.tolist())), color, thickness)
    image.resize((800, 450), Image.Resampling.LANCZOS).save(path)

# ---- The command line ----------------------------------------------------------------------------
def main(argv=None):
    """Parse the command line, check it, and train or generate."""
    def between(kind, low, high=float("inf")):
        def number(text):
            if low <= kind(text) <= high:
                return kind(text)
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return number
    found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    def fail(message):
        parser.exit(2, f"dcgan.py: error: {' '.join(str(message).split())}\n")
    parser.error = fail
    count, share, rate = between(int, 1), between(float, 0, 1), between(float, 0)
    add = parser.add_argument_group("data").add_argument
    add("--data", default=str(CELEBA_FOLDER), help="folder or .zip of pictures, or toy")
    add("--image-size", type=int, default=64, choices=(32, 64, 128, 256), help="in pixels")
    add("--crop", type=count, help="pixels of the centre crop (160 for CelebA, else all)")
    add = parser.add_argument_group("networks and training").add_argument
    add("--width", type=count, default=64, help="channels at half the image size")
    add("--activation", choices=("leaky_relu", "relu"), default="leaky_relu", help="generator's")
    add("--ema", type=share, default=0.999, help="decay of the generator's moving average")
    add("--epochs", type=count, default=20, help="passes over the pictures")
    add("--batch-size", type=count, default=128, help="images a step")
    add("--lr-g", type=rate, default=4e-4, help="generator's learning rate")
    add("--lr-d", type=rate, default=4e-4, help="discriminator's learning rate")
    add("--beta1", type=share, default=0.25, help="of Adam")
    add("--optimizer-d", choices=("adam", "sgd"), default="adam", help="discriminator's")
    add = parser.add_argument_group("tricks, off by default").add_argument
    add("--fresh-noise", action="store_true", help="new noise for the generator's half of a step")
    add("--label-smoothing", type=share, default=0.0, metavar="S", help="real labels are 1 - S")
    add("--flip-labels", type=share, default=0.0, metavar="P", help="share of D's labels swapped")
    add("--flip", action="store_true", help="mirror half of the real images")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="out", help="folder for everything that the run makes")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--generate", type=count, metavar="N", help="write N pictures from it instead")
    add("--seed", type=between(int, 0), default=42, help="decides all that is random")
    add("--device", default=str(found), help="cpu, cuda, cuda:1, mps, ...")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="bf16 if native")
    add("--log-interval", type=count, default=100, metavar="N", help="steps between rows")
    add("--dry-run", action="store_true", help="one step, one of each picture, done")
    args, checkpoint = parser.parse_args(argv), None
    try:
        if args.resume or args.generate:
            try:
                checkpoint = torch.load(f"{args.out}/checkpoint.pt", "cpu", weights_only=True)
                args = parser.parse_args(argv, argparse.Namespace(**checkpoint["settings"]))
            except Exception:
                raise UserError(f"--out {args.out} holds no checkpoint.pt, or a damaged one")
            free = {"epochs", "log_interval", "precision", args.generate and "seed"}
            for name, value in checkpoint["settings"].items():
                if name not in free and getattr(args, name) != value:
                    fail(f"the run in {args.out} has --{name.replace('_', '-')} {value}")
        try:
            torch.zeros(1, device=args.device).item()
        except (RuntimeError, AssertionError):
            raise UserError(f"--device {args.device}: not there; torch finds {found}")
        if args.generate:
            generate(checkpoint, args.generate, f"{args.out}/generated", args.seed, args.device)
        else:
            train(args, checkpoint)
    except (UserError, OSError, KeyboardInterrupt) as error:
        fail(str(error) or "interrupted")

if __name__ == "__main__":
    main()
