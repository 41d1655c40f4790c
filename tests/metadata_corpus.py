"""Pictures and videos from real encoders, with planted metadata of every kind that tools can write.

Every text that tells something has the word `PLANTED` in it, every place is near latitude 42.28,
every date is in the year 2019.
"""

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

import pillow_heif
from PIL import Image, ImageCms, PngImagePlugin

PLANTED: Final = "planted"
PLACE: Final = "+42.2800-083.7400/"
TRAILER: Final = b"planted bytes after the end"
_PROFILE: Final = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PROFILE: Final = _PROFILE[:24] + bytes(12) + _PROFILE[36:]
"""A colour profile, less the time at which it was made: it is the same each time."""
MEDIA_TYPES: Final = {
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".heic": "image/heic",
    ".mp4": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
}

# What may be said of a cleaned file: how it is encoded, and what chatterd.metadata wants to keep.
_TAGS_LEFT: Final = """
    AVCConfiguration AlphaCompression AlphaFiltering AlphaPreprocessing AnimationFrames
    AnimationIterations AnimationLoopCount AnimationPlays AudioBitsPerSample AudioChannels
    AudioFormat AudioSampleRate AuxiliaryImageType AverageBitrate AverageFrameRate AvgBitrate
    BackgroundColor Balance BitDepth BitDepthChroma BitDepthLuma BitsPerPixel BitsPerSample
    BufferSize ChromaFormat CleanAperture CodecID ColorComponents ColorPrimaries ColorProfiles
    ColorResolutionDepth ColorTransform ColorType CompatibleBrands Compression CompressorID
    ConstantFrameRate ConstraintIndicatorFlags CueClusterPosition CueTime CueTrack CurrentTime
    DCTEncodeVersion DocType DocTypeReadVersion DocTypeVersion Duration EBMLMaxIDLength
    EBMLMaxSizeLength EBMLReadVersion EBMLVersion EncodingProcess ExifByteOrder FileType
    FileTypeExtension Filter FrameCount GIFVersion GenProfileCompatibilityFlags GeneralLevelIDC
    GeneralProfileIDC GeneralProfileSpace GeneralTierFlag GraphicsMode HEVCConfigurationVersion
    HandlerClass HandlerType HasColorMap HorizontalScale ImageHeight ImagePixelDepth ImageSize
    ImageSpatialExtent ImageWidth Interlace JFIFVersion LayoutFlags MIMEType MajorBrand
    MatrixCoefficients MatrixStructure MaxBitrate MediaDataOffset MediaDataSize MediaDuration
    MediaHeaderVersion MediaLanguageCode MediaTimeScale Megapixels MinSpatialSegmentationIDC
    MinorVersion MovieFragmentSequence MovieHeaderVersion NextTrackID NumTemporalLayers OpColor
    Orientation Palette ParallelismType PixelAspectRatio PixelUnits PixelsPerUnitX PixelsPerUnitY
    PosterTime PreferredRate PreferredVolume PreviewDuration PreviewTime PrimaryItemReference
    ProfileName PurchaseFileFormat ResolutionUnit Rotation SelectionDuration SelectionTime
    SourceImageHeight SourceImageWidth TemporalIDNested TimeScale TimecodeScale TrackDefault
    TrackDuration TrackHeaderVersion TrackID TrackLacing TrackLanguage TrackLayer TrackNumber
    TrackType TrackUID TrackVolume TransferCharacteristics Transparency TransparentColor VP8Version
    VerticalScale VideoFieldOrder VideoFrameRate VideoScanType WebP_Flags XResolution
    YCbCrSubSampling YResolution
"""
_NOTHING: Final = ("", "0000:00:00 00:00:00", "(none)")

pillow_heif.register_heif_opener()


def run(program: str, *arguments: str | Path, stdin: str = "") -> str:
    """Return what a tool prints; the tests that need it fail without it."""
    assert shutil.which(program), (
        f"{program} is missing: apt-get install ffmpeg libimage-exiftool-perl"
    )
    done = subprocess.run(
        [program, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def described(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Return what exiftool finds in files, less what is said of every file, by their names."""
    skip = ("--System:all", "--ExifTool:all", "--ICC_Profile:all")
    output = run("exiftool", "-json", "-a", "-G1", "-ee", *skip, *paths)
    return {Path(found.pop("SourceFile")).name: found for found in json.loads(output)}


def surplus(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Return what exiftool finds in files that cleaned ones must not have, by their names."""
    found = {
        name: {
            tag: value
            for tag, value in tags.items()
            if value not in _NOTHING and tag.rpartition(":")[2] not in _TAGS_LEFT.split()
        }
        for name, tags in described(paths).items()
    }
    return {name: tags for name, tags in found.items() if tags}


def picture(size: tuple[int, int] = (64, 48), mode: str = "RGB", number: int = 0) -> Image.Image:
    """Return the same picture each time, for each number another."""
    noise = random.Random(number).randbytes(size[0] * size[1] * 3)  # noqa: S311 - no secret
    slope = Image.linear_gradient("L").resize(size).convert("RGB")
    return Image.blend(Image.frombytes("RGB", size, noise), slope, 0.5).convert(mode)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = tags[0x0110] = tags[0x013B] = PLANTED  # Make, Model, Artist
    tags[0x0112] = orientation
    tags.get_ifd(0x8769).update({0x927C: b"planted maker note", 0xA431: PLANTED})
    tags.get_ifd(0x8825).update({1: "N", 2: (42.0, 16.0, 48.0), 3: "W", 4: (83.0, 44.0, 24.0)})
    return tags


def make_pictures(folder: Path) -> list[Path]:
    """Write pictures of all kinds to `folder` and plant metadata in them."""
    rgb, rgba = picture(), picture(mode="RGBA")
    rgba.putalpha(Image.radial_gradient("L").resize(rgba.size))
    frames = [picture(number=number) for number in range(3)]
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", PLANTED)
    text.add_text("Comment", PLANTED * 20, zip=True)
    text.add_itxt("Title", PLANTED)
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{PLANTED}</x:xmpmeta>".encode()

    def save(image: Image.Image, name: str, **options: Any) -> None:  # noqa: ANN401 - Pillow's
        image.save(folder / name, **options)

    save(rgb, "baseline.jpeg", exif=exif(1), comment=PLANTED)
    save(rgb, "progressive.jpeg", progressive=True, exif=exif(6), icc_profile=PROFILE, xmp=xmp)
    save(rgb, "restarts.jpeg", restart_marker_blocks=1, exif=exif(8))
    save(picture(mode="CMYK"), "cmyk.jpeg", icc_profile=PROFILE)
    save(picture(mode="L"), "grey.jpeg", exif=exif(3))
    save(rgb, "several.jpeg", format="MPO", save_all=True, append_images=frames, exif=exif(5))
    save(rgb, "rgb.png", pnginfo=text, exif=exif(6), icc_profile=PROFILE)
    save(rgba, "alpha.png", pnginfo=text, dpi=(72, 72))
    save(rgb.quantize(16), "palette.png", pnginfo=text, transparency=3)
    save(picture(mode="I;16"), "deep.png", pnginfo=text)
    save(frames[0], "animated.png", save_all=True, append_images=frames[1:], exif=exif(3))
    save(rgb, "still.gif", comment=PLANTED)
    save(
        frames[0], "animated.gif", save_all=True, append_images=frames[1:], loop=3, comment=PLANTED
    )
    save(rgb, "lossy.webp", exif=exif(6), xmp=xmp, icc_profile=PROFILE)
    save(rgba, "alpha.webp", lossless=True, exif=exif(1), xmp=xmp)
    save(frames[0], "animated.webp", save_all=True, append_images=frames[1:], exif=exif(8))
    save(rgb, "plain.webp")
    save(rgb, "rgb.heic", exif=exif(6).tobytes(), xmp=xmp)
    save(rgba, "alpha.heic", exif=exif(1).tobytes())
    save(frames[0], "several.heic", save_all=True, append_images=frames[1:], icc_profile=PROFILE)
    paths = sorted(folder.iterdir())
    _plant_in_pictures(paths)
    return paths


def _plant_in_pictures(paths: list[Path]) -> None:
    texts = (
        "EXIF:Artist EXIF:UserComment EXIF:OwnerName EXIF:SerialNumber XMP-dc:Creator"
        " XMP-photoshop:City XMP-tiff:Make IPTC:By-line IPTC:City Comment PNG:Author"
    )
    places = (
        "-EXIF:GPSLatitude=42.28",
        "-EXIF:GPSLatitudeRef=N",
        "-XMP:GPSLatitude=42.28",
        "-EXIF:DateTimeOriginal=2019:01:02 03:04:05",
    )
    planted = [f"-{tag}={PLANTED}" for tag in texts.split()]
    # -m: not every format has a place for each of them.
    run("exiftool", "-q", "-q", "-m", "-overwrite_original", *planted, *places, *paths)
    for path in paths:
        if path.suffix != ".heic":  # where bytes after the end are part of no box, and refused
            with path.open("ab") as file:
                file.write(TRAILER)


def make_videos(folder: Path) -> list[Path]:
    """Write videos of all kinds to `folder` and plant metadata in them."""
    subtitles = folder / "subtitles.srt"
    subtitles.write_text(f"1\n00:00:00,000 --> 00:00:00,900\nGPS {PLACE} {PLANTED}\n")
    chapters = folder / "chapters.txt"
    chapters.write_text(f";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/1\nSTART=0\nEND=1\ntitle={PLANTED}\n")
    h264 = ("-c:v", "libx264", "-c:a", "aac")
    as_keys = ("-movflags", "use_metadata_tags")
    in_fragments = ("-movflags", "frag_keyframe+empty_moov+default_base_moof")
    _encode(folder / "plain.mp4", *h264, "-movflags", "faststart")
    _encode(folder / "hevc.mp4", "-c:v", "libx265", "-x265-params", "log-level=0", *as_keys)
    _encode(folder / "fragments.mp4", *h264, *in_fragments, "-write_prft", "wallclock")
    _encode(folder / "subtitles.mp4", *h264, "-c:s", "mov_text", more=("-i", subtitles))
    _encode(folder / "chapters.mp4", *h264, more=("-i", chapters))
    _encode(folder / "keys.mov", *h264, *as_keys, "-timecode", "01:02:03:04")
    _encode(folder / "camera.mov", "-c:v", "prores", "-c:a", "pcm_s16le")
    _encode(folder / "vp8.webm", "-c:v", "libvpx", "-c:a", "libvorbis", more=("-i", chapters))
    _encode(folder / "vp9.webm", "-c:v", "libvpx-vp9", "-c:a", "libopus", "-write_crc32", "1")
    _encode(folder / "live.webm", "-c:v", "libvpx", "-c:a", "libopus", "-live", "1")
    subtitles.unlink()
    chapters.unlink()
    paths = sorted(folder.iterdir())
    planted = (
        f"-XMP-dc:Creator={PLANTED}",
        f"-Keys:Author={PLANTED}",
        f"-ItemList:Artist={PLANTED}",
        f"-UserData:Model={PLANTED}",
        "-GPSCoordinates=42.28 -83.74 200",
        "-CreateDate=2019:01:02 03:04:05",
    )
    movies = [path for path in paths if path.suffix != ".webm" and path.stem != "fragments"]
    run("exiftool", "-q", "-q", "-m", "-overwrite_original", *planted, *movies)
    return paths


def _encode(path: Path, *options: str, more: tuple[str | Path, ...] = ()) -> None:
    planted = [("-metadata", f"{tag}={PLANTED}") for tag in _VIDEO_TAGS.split()]
    sources = ("testsrc=size=64x48:rate=10:duration=1", "sine=duration=1:sample_rate=48000")
    inputs = chain.from_iterable(("-f", "lavfi", "-i", source) for source in sources)
    maps = ("-map", "0:v", "-map", "1:a", *(("-map", "2:s") if "-c:s" in options else ()))
    run(
        "ffmpeg",
        *("-v", "error", "-nostdin", "-y", *inputs, *more, *maps, *chain.from_iterable(planted)),
        *("-metadata", f"location={PLACE}", "-metadata", "creation_time=2019-01-02T03:04:05Z"),
        *("-metadata", f"com.apple.quicktime.location.ISO6709={PLACE}"),
        *("-metadata:s:v", f"handler_name={PLANTED}", "-metadata:s:a", f"title={PLANTED}"),
        *("-pix_fmt", "yuv422p10" if "prores" in options else "yuv420p", *options, path),
    )


_VIDEO_TAGS: Final = (
    "title artist author comment copyright make model com.apple.quicktime.make"
    " com.apple.quicktime.model"
)


def decoded(path: Path) -> str:
    """Return a digest of every frame of picture and sound that ffmpeg decodes, with its time."""
    decode = ("-map", "0:v", "-map", "0:a", "-f", "framemd5", "-")
    return run("ffmpeg", "-v", "error", "-nostdin", "-i", path, *decode)


def pixels(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the pixels of the pictures in a file, of JPEG files the first: others are appended."""
    with Image.open(path) as image:
        count = 1 if path.suffix == ".jpeg" else getattr(image, "n_frames", 1)
        for number in range(count):
            image.seek(number)
            yield image.mode, image.tobytes()
