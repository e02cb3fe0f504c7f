"""Excerpts, the switching player, the listening page, the blind test and widgets (notebook 06)."""

from mss_utils.listening.blind_test import (
    TABLES,
    import_responses,
    opinion_sentence,
    response_files,
    write_ratings,
)
from mss_utils.listening.excerpts import (
    RANKS,
    cut_excerpt,
    excerpt_players,
    excerpts,
    validation_excerpt,
)
from mss_utils.listening.page import listening_page, write_page
from mss_utils.listening.player import frame, players, reencode
from mss_utils.listening.widgets import answers_upload, song_upload, track_menu

__all__ = ["RANKS", "TABLES", "answers_upload", "cut_excerpt", "excerpt_players", "excerpts"]
__all__ += ["frame", "import_responses", "listening_page", "opinion_sentence", "players"]
__all__ += ["reencode", "response_files", "song_upload", "track_menu", "validation_excerpt"]
__all__ += ["write_page", "write_ratings"]
