"""What is drawn of pictures lies beside them, and replaces none of the user's files."""

import pytest
from PIL import Image

from cvjax.errors import UserError
from cvjax.report.drawings import Drawings, is_drawing

DRAWN = Image.new("L", (4, 3))


def test_a_drawing_is_replaced_and_known_again(tmp_path):
    picture = tmp_path / "ä \udcff.jpg"
    for _ in range(2):
        file = Drawings([picture]).save(DRAWN, picture, "labels")
        assert file == tmp_path / "ä \udcff_labels.png" and is_drawing(file)
    assert not is_drawing(picture) and not is_drawing(tmp_path)


def test_files_of_the_user_stay(tmp_path):
    labels = tmp_path / "a_labels.png"
    Image.new("L", (2, 2)).save(labels)
    content = labels.read_bytes()
    with pytest.raises(UserError, match=r"a_labels\.png .* not replaced.*--output"):
        Drawings([tmp_path / "a.png"]).save(DRAWN, tmp_path / "a.png", "labels")
    assert labels.read_bytes() == content and not is_drawing(labels)
    other = tmp_path / "other"
    other.mkdir()
    file = Drawings([tmp_path / "a.png"], other).save(DRAWN, tmp_path / "a.png", "labels")
    assert file == other / "a_labels.png"


def test_pictures_of_one_stem_have_drawings_of_their_own(tmp_path):
    pictures = [tmp_path / "a.png", tmp_path / "a.jpg", tmp_path / "b.png"]
    drawings = Drawings([*pictures, tmp_path / "b.png"])
    names = [drawings.save(DRAWN, picture, "labels").name for picture in pictures]
    assert names == ["a.png_labels.png", "a.jpg_labels.png", "b_labels.png"]
    # In calls of their own the second does not replace that of the first either.
    later = tmp_path / "b.jpg"
    assert Drawings([later]).save(DRAWN, later, "labels").name == "b.jpg_labels.png"


def test_pictures_of_one_name_and_one_output(tmp_path):
    pictures = [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"]
    drawings = Drawings(pictures, tmp_path)
    drawings.save(DRAWN, pictures[0], "boxes")
    with pytest.raises(UserError, match=r"drawn of .*x/a\.png already"):
        drawings.save(DRAWN, pictures[1], "boxes")
