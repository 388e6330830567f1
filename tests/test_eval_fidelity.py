"""FID and its kin against formulas, LPIPS and autoencoders of diffusers through the one command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, text_tower
from torch import nn

from unitok.cli import main
from unitok.core.errors import CheckpointError, DataError, UserError
from unitok.data.source import open_source
from unitok.eval.autoencoders import open_autoencoder
from unitok.eval.fidelity import LAYER, LOGITS, Features, distances, fid_to_statistics, load_inception, to_uint8
from unitok.eval.reconstruction import evaluate_reconstruction
from unitok.tokenizer.official import save_official


class TinyNetwork(nn.Module):
    """Mean colour of the image's four quarters as features: of torch-fidelity's form."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        features = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features, features[:, :4] * 3

    def convert_features_tuple_to_dict(self, features):
        return dict(zip((LAYER, LOGITS), features, strict=True))


def gaussian(seed, count=400, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 6, generator=generator) + shift
    return {LAYER: rows, LOGITS: rows[:, :4]}


def frechet(a, b):
    """The distance by its formula, the root of a symmetric product through eigenvectors."""
    a, b = a.double().numpy(), b.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross


def test_fid_is_the_formula_and_zero_for_equal_sets():
    ours, theirs = gaussian(0), gaussian(1, shift=0.5)
    found = distances(ours, theirs)
    assert found["fid"] == pytest.approx(frechet(ours[LAYER], theirs[LAYER]), rel=1e-6)
    same = distances(ours, ours)
    assert abs(same["fid"]) < 1e-6 and same["precision"] == same["recall"] == 1
    assert found["kid"] > same["kid"] and found["kid_subset_size"] == 200


def test_inception_score_by_hand():
    logits = torch.tensor([[20.0, 0.0], [0.0, 20.0]]).repeat(50, 1)
    sets = {LAYER: gaussian(0, 100)[LAYER], LOGITS: logits}
    found = distances(sets, sets)
    assert found["isc"] == pytest.approx(2, abs=0.1)  # two classes, each certain


def test_precision_and_recall_of_disjoint_sets_are_zero():
    found = distances(gaussian(0), gaussian(1, shift=100.0))
    assert found["precision"] == found["recall"] == 0


def test_too_few_images_and_foreign_statistics_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least 6"):
        distances(gaussian(0, 3), gaussian(1, 3))
    rows = gaussian(0)[LAYER].double().numpy()
    np.savez(tmp_path / "ref.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    assert abs(fid_to_statistics(gaussian(0), tmp_path / "ref.npz")) < 1e-6
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(DataError, match="another network"):
        fid_to_statistics(gaussian(0), tmp_path / "bad.npz")
    np.savez(tmp_path / "none.npz", arr_0=np.zeros(3))
    with pytest.raises(DataError, match="no mu and sigma"):
        fid_to_statistics(gaussian(0), tmp_path / "none.npz")


def test_features_gather_batches_and_refuse_none():
    features = Features(TinyNetwork())
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    features.add(images[:2])
    features.add(images[2:])
    assert torch.equal(features.gathered()[LAYER], TinyNetwork()(images)[0])
    with pytest.raises(DataError, match="no image"):
        Features(TinyNetwork()).gathered()
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist() == [0, 128, 255, 255]


def test_inception_weights_are_named_where_absent_and_read_without_trust(tmp_path):
    with pytest.raises(UserError, match="weights-inception-2015-12-05"):
        load_inception(None)
    torch.save({"foreign": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match="not torch-fidelity's InceptionV3"):
        load_inception(tmp_path / "other.pth")


class Identity(nn.Module):
    """An autoencoder that changes nothing, and one that darkens."""

    def __init__(self, shift=0.0):
        super().__init__()
        from types import SimpleNamespace

        self.config, self.shift = SimpleNamespace(image_size=64, preprocess="plain", num_codebooks=0), shift

    def encode(self, pixels):
        return pixels

    def decode(self, latents):
        return latents - self.shift


def test_reconstruction_of_the_identity_is_perfect_and_of_a_darker_one_is_not():
    from unitok.tokenizer.lpips import LPIPS

    source, network = open_source("shapes:val?num=12"), LPIPS.random()

    def lpips(a, b):
        return torch.stack([network(b[i : i + 1], a[i : i + 1]) for i in range(len(a))])

    perfect = evaluate_reconstruction(Identity(), source, batch_size=5, lpips=lpips, inception=TinyNetwork())
    assert perfect["psnr_db"] == 100 and perfect["lpips"] == 0 and abs(perfect["rfid"]) < 1e-9
    assert perfect["psnr_db_se"] == 0 and "usage" not in perfect and perfect["num_images"] == 12
    worse = evaluate_reconstruction(Identity(0.2), source, batch_size=5, lpips=lpips, inception=TinyNetwork())
    assert worse["psnr_db"] < 25 and worse["lpips"] > 0 and worse["rfid"] > 0.01 and worse["psnr_db_se"] > 0


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (unitok[diffusers])")
    folder = tmp_path_factory.mktemp("vae") / "sd-vae"
    torch.manual_seed(0)
    diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_vae_of_diffusers_beside_another_in_one_command(vae, tmp_path, capsys):
    model = open_autoencoder(str(vae), image_size=64)
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        assert model.decode(model.encode(pixels)).shape == pixels.shape
    out = tmp_path / "results.json"
    command = ["eval", "reconstruction", "--source", "shapes:val?num=8", "--image-size", "64", "--out", str(out)]
    assert (
        main([*command, "--tokenizer", str(vae), "--tokenizer", f"{vae.parent}/../{vae.parent.name}/{vae.name}"]) == 0
    )
    assert "psnr_db" in capsys.readouterr().out
    written = json.loads(out.read_text())
    first, second = written["systems"].values()
    assert first == second and 0 < first["psnr_db"] < 30 and written["protocol"]["counts"]["images"] == 8


@pytest.mark.parametrize("first", ["released", "vae"])
def test_a_release_and_a_vae_see_the_same_pixels(first, vae, tmp_path, capsys, monkeypatch):
    """docs/benchmarks.md's first command: a released .pth says how images are cut, and the VAE follows."""
    from unitok.commands import reconstruction

    tokenizer = make_tokenizer(text_tower=text_tower(tokenizer="clip"), projection_mlp_ratio=2.0)
    tokenizer.config.preprocess = "inference"
    save_official(tokenizer, tmp_path / "released.pth")
    out = tmp_path / "results.json"
    source = ["--source", "shapes:val?num=4&size=32", "--out", str(out)]
    paths = [str(tmp_path / "released.pth"), str(vae)]
    paths = paths if first == "released" else paths[::-1]
    both = [word for path in paths for word in ("--tokenizer", path)]
    assert main(["eval", "reconstruction", *both, *source]) == 0
    written = json.loads(out.read_text())
    assert written["protocol"]["preprocess"] == "inference" and written["protocol"]["image_size"] == 32
    assert list(written["systems"]) == [Path(path).name for path in paths]
    assert len({run["protocol"]["preprocess"] for run in written["runs"].values()}) == 1
    assert main(["eval", "reconstruction", *both, *source, "--preprocess", "vae_val"]) == 0
    assert json.loads(out.read_text())["protocol"]["preprocess"] == "vae_val"
    capsys.readouterr()
    tokenizer.config.preprocess = "plain"
    tokenizer.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(reconstruction, "_one", lambda *_: pytest.fail("measured before the settings were compared"))
    assert main(["eval", "reconstruction", *both, "--tokenizer", str(tmp_path / "plain"), *source]) == 2
    assert "cut images in different ways" in capsys.readouterr().err
    assert main(["eval", "reconstruction", *both, *source, "--image-size", "64"]) == 2
    assert "released.pth works at 32 pixels, the others at 64" in capsys.readouterr().err


def tiny_of_diffusers(kind):
    """One of each kind that is accepted, with random weights, for 32 pixels."""
    import diffusers

    down, up, attention = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, {"attention_head_dim": 4}
    blocks = {"down_block_types": down, "up_block_types": up, "norm_num_groups": 4}
    deep = {"encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2, **attention}
    deep |= {f"{side}_block_out_channels": (8, 16) for side in ("encoder", "decoder")}
    deep |= {f"{side}_layers_per_block": (1, 1) for side in ("encoder", "decoder")}
    deep |= {f"{side}_qkv_multiscales": ((), ()) for side in ("encoder", "decoder")}
    sizes = {
        "AutoencoderTiny": {
            "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
        },
        "AsymmetricAutoencoderKL": {
            "down_block_types": down, "up_block_types": up, "down_block_out_channels": (32, 32),
            "up_block_out_channels": (32, 32), "latent_channels": 2,
        },
        "AutoencoderDC": {"latent_channels": 8, **deep},
        "VQModel": {**blocks, "block_out_channels": (8, 16), "latent_channels": 3, "num_vq_embeddings": 24},
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(diffusers, kind)(**sizes[kind]).eval()


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AsymmetricAutoencoderKL", "AutoencoderDC", "VQModel"])
def test_autoencoders_of_diffusers_by_the_name_of_their_class(kind, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed (unitok[diffusers])")
    network = tiny_of_diffusers(kind)
    network.save_pretrained(tmp_path)
    model = open_autoencoder(str(tmp_path), image_size=32)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        encoded = model.encode(pixels)
        # AutoencoderTiny's own pass stores its latent in 8 bits; decoding the latent itself is how it is used
        whole = network.decode(network.encode(pixels).latents) if kind == "AutoencoderTiny" else network(pixels)
        torch.testing.assert_close(model.decode(encoded), whole.sample, rtol=1e-4, atol=1e-5)
    if kind == "VQModel":
        assert encoded.shape == (2, 1, 16 * 16) and len(encoded.unique()) > 1
        found = evaluate_reconstruction(model, open_source("shapes:val?num=2&size=32"))
        assert found["dead_codes"] == 24 - round(found["usage"] * 24) < 24


def test_dry_run_lists_what_is_missing(tmp_path, capsys):
    command = ["eval", "reconstruction", "--source", "shapes:val?num=8", "--tokenizer", str(tmp_path / "none")]
    assert main([*command, "--inception", str(tmp_path / "inception.pth"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "would measure: reconstruction of 8 images" in printed and f"missing: {tmp_path / 'none'}" in printed
    assert "github.com/toshas/torch-fidelity" in printed and "left out: LPIPS" in printed


def test_a_folder_of_something_else_is_refused(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed (unitok[diffusers])")
    for config, found in (
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel'"),
        ({"_class_name": "AutoencoderKLWan"}, "_class_name is 'AutoencoderKLWan'"),  # of videos
        ({"model_type": "bert"}, "model_type is 'bert'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"{found}; expected a UniTok folder.*VQModel"):
            open_autoencoder(str(tmp_path))
    with pytest.raises(UserError, match="expected hub:OWNER/REPOSITORY"):
        open_autoencoder("hub:sd-vae")
