"""Excerpts, the switching player, the listening page, the blind test and widgets (notebook 06)."""

from mss_utils.listening.blind_test import TABLES, write_ratings
from mss_utils.listening.excerpts import cut_excerpt, excerpts, validation_excerpt
from mss_utils.listening.page import listening_page
from mss_utils.listening.player import frame, players
from mss_utils.listening.widgets import answers_upload, song_upload, track_menu
