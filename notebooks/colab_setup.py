"""Install this clone into a Colab runtime; the second cell of every notebook runs it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("mss_utils") is None:
    command = [sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"]
    subprocess.run(command, cwd=root, check=True)
    sys.path.insert(0, str(root))  # this kernel started before the installation
