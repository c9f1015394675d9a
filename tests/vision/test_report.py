"""The report of a run of pictures."""

from corelora.evaluate.page import report
from corelora.train.run import train
from vision.helpers import TEXTURES, make_recipe


def test_the_page_has_a_row_a_class(clip, pictures, tmp_path):
    """From the results of a real run."""
    results = train(make_recipe(clip, pictures, loop={"steps": 2}), tmp_path)
    page = report(tmp_path).read_text()
    for name in TEXTURES:
        row = f"<tr><td>{name}</td><td>8</td><td>{100 * results['classes'][name]['accuracy']:.1f}</td>"
        assert row in page
    assert f"zero shot accuracy {results['zero_shot_accuracy']:.4f}" in page
    assert "nora" in page
