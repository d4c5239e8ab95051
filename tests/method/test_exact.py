"""`--preset exact` at a size at which the ranks of other presets decode together, which rounds."""

from PIL import Image

from tests.processes import call, torchrun


def test_exact_decodes_alone_so_that_a_large_picture_too_is_the_one_of_one_device(tmp_path, monkeypatch):
    """`equal` pixels at 512 x 512 on two ranks and by `serial`: `condition` is equal, and one rank alone decodes."""
    options = ["--seed", "5", "--steps", "1", "--height", "512", "--width", "512"]
    two, one = tmp_path / "two.png", tmp_path / "one.png"
    ran = torchrun(*options, "--preset", "exact", "--out", str(two))
    assert ran.returncode == 0, ran.stderr
    assert call(monkeypatch, *options, "--strategy", "serial", "--out", str(one)) == 0
    pictures = [Image.open(path) for path in (two, one)]
    assert pictures[0].size == (512, 512)
    assert pictures[0].tobytes() == pictures[1].tobytes()
