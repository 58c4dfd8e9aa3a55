#!/usr/bin/env bash
# The one system library of the simulator: OSMesa, which renders without a GPU or a display.
# Installs it with apt-get when that is possible without a password; otherwise prints the command and fails.
set -euo pipefail
python=${1:-python3}

has_osmesa() { "$python" -c 'import ctypes.util, sys; sys.exit(ctypes.util.find_library("OSMesa") is None)'; }

if has_osmesa; then exit 0; fi
if [ "${MUJOCO_GL:-osmesa}" = egl ]; then echo "MUJOCO_GL=egl: using the GPU driver's EGL, OSMesa is not needed"; exit 0; fi
if command -v apt-get >/dev/null; then
  if [ "$(id -u)" = 0 ]; then sudo=""; else sudo="sudo -n"; fi
  $sudo apt-get install -y --no-install-recommends libosmesa6 >/dev/null 2>&1 ||
    { $sudo apt-get update >/dev/null 2>&1 && $sudo apt-get install -y --no-install-recommends libosmesa6 >/dev/null 2>&1; } || true
fi
if has_osmesa; then exit 0; fi
cat >&2 <<'TXT'
The simulator needs the OSMesa library for headless rendering, and it could not be installed automatically.
  Debian, Ubuntu:  sudo apt-get install libosmesa6
  Fedora:          sudo dnf install mesa-libOSMesa
  With an NVIDIA GPU and its driver you can use EGL instead:  export MUJOCO_GL=egl
Then run the same make command again.
TXT
exit 1
