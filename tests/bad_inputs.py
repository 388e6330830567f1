"""The table of unusual and bad samples: what each is made of, and the outcome that docs/data.md promises.

A row of SAMPLES is one sample of a shard. Its outcome is an `Image` (RGB pixels that must come out, each channel within
`TOLERANCE`), the captions that must come out, or the kind of a bad sample.
"""

import io
import json
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

TOLERANCE = 8  # of 255 levels: JPEG and WebP lose a little
SIZE = (24, 16)


class Row(NamedTuple):
    name: str
    members: dict[str, bytes]
    image: Image.Image | None = None
    captions: list[str] | None = None
    bad: str = ""


def picture(mode: str = "RGB") -> Image.Image:
    """Four flat quarters, which every codec keeps: red, green, blue, grey."""
    image = Image.new("RGB", SIZE, (120, 120, 120))
    image.paste((220, 30, 40), (0, 0, 12, 8))
    image.paste((30, 200, 60), (12, 0, 24, 8))
    image.paste((40, 50, 210), (0, 8, 12, 16))
    return image if mode == "RGB" else image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    if kind in ("JPEG", "MPO"):
        options = {"quality": 98, "subsampling": 0} | options
    image.save(stream, kind, **options)
    return stream.getvalue()


def raw_png(width: int, height: int, bits: int, color: int, rows: bytes | None, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG chunk by chunk, for what PIL does not write. rows: filter byte and samples of each row, or None."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)), *more]
    if rows is not None:
        chunks.append((b"IDAT", zlib.compress(rows)))
    chunks.append((b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bomb_png(side: int = 20000) -> bytes:
    """Some kilobytes that are 20000 x 20000 pixels."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    whole = raw_png(side, side, 1, 0, None)
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return whole[:33] + chunk + whole[33:]


def turned_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), "JPEG", exif=exif)


def _broken_exif() -> bytes:
    return encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)


def _half_clear() -> tuple[Image.Image, Image.Image]:
    """An image whose right half is clear, and how it looks on white."""
    image, shown = picture("RGBA"), picture()
    image.paste((9, 9, 9, 0), (12, 0, 24, 16))
    shown.paste("white", (12, 0, 24, 16))
    return image, shown


def _clear_palette() -> tuple[bytes, Image.Image]:
    image = Image.new("P", SIZE, 0)
    image.putpalette([10, 200, 10, 200, 10, 10])
    image.paste(1, (12, 0, 24, 16))
    shown = Image.new("RGB", SIZE, (10, 200, 10))
    shown.paste("white", (12, 0, 24, 16))
    return encoded(image, "PNG", transparency=1), shown


def _sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(picture("L"), dtype=np.uint16) * 257)


def _colors_of_sixteen_bits() -> bytes:
    levels = np.asarray(picture(), dtype=">u2") * 257
    return raw_png(*SIZE, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels))


def _colors_with_a_clear_one() -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(picture()))
    return raw_png(*SIZE, 8, 2, rows, (b"tRNS", struct.pack(">HHH", 120, 120, 120)))


def _film(kind: str) -> bytes:
    return encoded(picture(), kind, save_all=True, append_images=[picture().rotate(180)], lossless=True)


def image_rows() -> list[Row]:
    png, jpeg, webp = (encoded(picture(), kind) for kind in ("PNG", "JPEG", "WEBP"))
    lossless = encoded(picture(), "WEBP", lossless=True)
    clear, on_white = _half_clear()
    palette, palette_shown = _clear_palette()
    grey_white = picture()
    grey_white.paste("white", (12, 8, 24, 16))
    same, long = picture(), Image.new("RGB", (20000, 1), "red")
    flipped = bytes([*png[:60], png[60] ^ 255, *png[61:]])
    return [
        Row("jpeg cut in half", {"jpg": jpeg[: len(jpeg) // 2]}, bad="unreadable image"),
        Row("png cut in half", {"png": png[: len(png) // 2]}, bad="unreadable image"),
        Row("webp cut in half", {"webp": webp[: len(webp) // 2]}, bad="unreadable image"),
        Row("png with a flipped byte", {"png": flipped}, bad="unreadable image"),
        Row("image of no bytes", {"jpg": b""}, bad="unreadable image"),
        Row("text named jpg", {"jpg": b"404 not found"}, bad="unreadable image"),
        Row("html named png", {"png": b"<!doctype html><html></html>"}, bad="unreadable image"),
        Row("svg named png", {"png": b'<svg xmlns="http://www.w3.org/2000/svg"/>'}, bad="unreadable image"),
        Row("eps named jpg, a program", {"jpg": encoded(same, "EPS")}, bad="unreadable image"),
        Row("numbers of floating point", {"png": encoded(picture("F"), "TIFF")}, bad="unreadable image"),
        Row("numbers of 32 bits", {"png": encoded(picture("I"), "TIFF")}, bad="unreadable image"),
        Row("png named jpg", {"jpg": png}, same),
        Row("jpeg named png", {"png": jpeg}, same),
        Row("webp named jpg", {"jpg": lossless}, same),
        Row("gif named png", {"png": encoded(same, "GIF")}, same),
        Row("bmp named jpg", {"jpg": encoded(same, "BMP")}, same),
        Row("ending in capitals", {"JPG": jpeg}, same),
        *(
            Row(f"a {name}", {name: encoded(same, kind)}, same)
            for name, kind in (("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF"), ("tiff", "TIFF"), ("ppm", "PPM"))
        ),
        Row("a tif beside the jpg", {"tif": encoded(long, "TIFF"), "jpg": jpeg}, same),
        Row("bomb of 20000 x 20000", {"png": bomb_png()}, bad="too many pixels"),
        Row("header of 2^31 x 2^31", {"png": raw_png(2**31 - 1, 2**31 - 1, 8, 2, b"")}, bad="too many pixels"),
        Row("1 x 1", {"png": encoded(Image.new("RGB", (1, 1), "red"), "PNG")}, Image.new("RGB", (1, 1), "red")),
        Row("20000 x 1", {"png": encoded(long, "PNG")}, long),
        Row("cmyk", {"jpg": encoded(picture("CMYK"), "JPEG")}, same),
        Row("grey", {"jpg": encoded(picture("L"), "JPEG")}, picture("L").convert("RGB")),
        Row("one bit", {"png": encoded(picture("1"), "PNG")}, picture("1").convert("RGB")),
        Row("16 bits", {"png": encoded(_sixteen_bits(), "PNG")}, picture("L").convert("RGB")),
        Row("16 bits a colour", {"png": _colors_of_sixteen_bits()}, same),
        Row("palette", {"png": encoded(picture().quantize(4), "PNG")}, same),
        Row("palette with a clear entry", {"png": palette}, palette_shown),
        Row("alpha", {"png": encoded(clear, "PNG")}, on_white),
        Row("grey with alpha", {"png": encoded(clear.convert("LA"), "PNG")}, on_white.convert("L").convert("RGB")),
        Row("a colour that is clear", {"png": _colors_with_a_clear_one()}, grey_white),
        Row("alpha in webp", {"webp": encoded(clear, "WEBP", lossless=True)}, on_white),
        *(
            Row(f"exif orientation {number}", {"jpg": turned_jpeg(number)}, same.transpose(how))
            for number, how in ((2, 0), (3, 3), (4, 1), (5, 5), (6, 4), (7, 6), (8, 2))
        ),
        Row("broken exif", {"jpg": _broken_exif()}, same),
        Row("progressive", {"jpg": encoded(same, "JPEG", progressive=True)}, same),
        Row("animated gif", {"png": _film("GIF")}, same),
        Row("animated webp", {"webp": _film("WEBP")}, same),
        Row("animated png", {"png": _film("PNG")}, same),
        Row("two pictures in one jpeg", {"jpg": encoded(same, "MPO", save_all=True, append_images=[same])}, same),
    ]


def text_rows() -> list[Row]:
    png = encoded(picture(), "PNG")

    def row(name: str, captions: list[str] | None = None, bad: str = "", **members: bytes) -> Row:
        return Row(name, {"png": png, **members}, None, captions, bad)

    def js(value: Any) -> bytes:
        return json.dumps(value).encode()

    answer = {"role": "assistant", "content": "a"}
    question = {"role": "user", "content": "q"}
    scrape = {"caption": "a\nb", "url": "http://x/y", "sha256": "0", "width": 24, "exif": "{}", "key": "1"}
    return [
        row("caption in latin-1", bad="not UTF-8", txt="caf\xe9".encode("latin-1")),
        row("caption in utf-16", bad="not UTF-8", txt="a caption".encode("utf-16")),
        row("caption in utf-16 without a mark", bad="not UTF-8", txt="a caption".encode("utf-16-le")),
        row("NUL in a caption", bad="not UTF-8", txt=b"a\0b"),
        row("json in latin-1", bad="not UTF-8", json='{"caption": "caf\xe9"}'.encode("latin-1")),
        row("half a surrogate pair", bad="not UTF-8", json=b'{"caption": "\\ud800"}'),
        *(
            row(f"half a surrogate pair in {name}", bad="not UTF-8", json=text.replace("?", "\\ud83d").encode())
            for name, text in (
                ("a field of its own", '{"caption": "a", "url": "http://x/?"}'),
                ("a list of a list", '{"caption": "a", "tags": [["?"]]}'),
                ("the name of a field", '{"caption": "a", "x": {"?": 1}}'),
                ("the type of a question", '{"questions": [{"type": "?", "question": "b", "answer": "c"}]}'),
            )
        ),
        row("a field nested 300 deep", bad="not JSON", json=b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"),
        row("a field nested 150 deep", [], json=b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}"),
        row(
            "whole surrogate pairs and a NUL in a field",
            ["a"],
            json=b'{"caption": "a", "url": "\\ud83d\\ude00\\u0000"}',
        ),
        row("numbers without end in a field", ["a"], json=b'{"caption": "a", "x": [NaN, 1e999, -1e999]}'),
        row("byte order mark", ["a caption"], txt="a caption".encode("utf-8-sig")),
        row("byte order mark before json", ["x"], json=b"\xef\xbb\xbf" + js({"caption": "x"})),
        row("empty caption", [], txt=b""),
        row("blank caption", [], txt=b" \n\t\n"),
        row("null caption", [], json=js({"caption": None, "questions": None})),
        row("no words at all", []),
        row("lines ended as on Windows", ["a", "b"], txt=b"a\r\nb\r\n"),
        row("many scripts", ["猫 🐈 \u202eabc"], txt="猫 🐈 \u202eabc".encode()),
        row("separators within a line", ["a\u2028b\x0cc"], txt="a\u2028b\x0cc".encode()),
        row("img2dataset's json, caption of two lines", ["a\nb"], txt=b"a\nb", json=js(scrape)),
        row("caption in both files", ["a cat"], txt=b"a cat", json=js({"caption": " a cat "})),
        row("caption of a megabyte", bad="too long", txt=b"word " * 200_000),
        row("json of 20 megabytes", bad="too long", json=js({"pad": "x" * 20_000_000})),
        row("json cut off", bad="not JSON", json=b'{"caption": "a'),
        row("json nested 100000 deep", bad="not JSON", json=b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        row("number of 5000 digits", bad="not JSON", json=b'{"a": ' + b"9" * 5000 + b"}"),
        row("json list", bad="wrong type", json=b"[1]"),
        row("caption is a number", bad="wrong type", json=js({"caption": 3})),
        row("captions is a text", bad="wrong type", json=js({"captions": "a"})),
        row("questions is a number", bad="wrong type", json=js({"questions": 3})),
        row("question without an answer", bad="wrong type", json=js({"questions": [{"type": "a", "question": "b"}]})),
        row("mark of an image in a caption", bad="mark in text", txt=b"see <image>"),
        row("conversations is a text", bad="conversation", json=js({"conversations": "hi"})),
        row("conversation without an answer", bad="conversation", json=js({"conversations": [question]})),
        row("conversation that begins with an answer", bad="conversation", json=js({"conversations": [answer]})),
        Row("no image", {"txt": b"a caption"}, bad="missing image"),
        Row("image under another name", {"seg.png": png, "txt": b"a"}, bad="missing image"),
    ]


SAMPLES = image_rows() + text_rows()
