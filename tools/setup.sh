#!/usr/bin/env bash
# Gets a Debian machine ready for this checkout: Debian's packages, .venv, the C extension, byte code.
# What is there already is left alone, so a second run does nothing but look.
set -euo pipefail
cd "$(dirname "$0")/.."
python=/usr/bin/python3

say() { echo "setup: $*" >&2; }

missing=()
need() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed || missing+=("$1"); }
for package in acpica-tools binutils busybox-static dnsmasq-base e2fsprogs ethtool fio gcc haproxy iperf3 iproute2 \
    ipxe iputils-ping kmod libc6-dev libvhdi-utils make nftables passt python3-libvhdi qemu-system-x86 qemu-utils \
    seabios sg3-utils tcpdump util-linux xfsprogs; do
    need "$package"
done
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then missing+=(python3-venv); fi
if ! "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null; then
    missing+=(python3-dev)
fi
if ((${#missing[@]})); then
    if ((EUID != 0)); then
        say "run as root: apt-get install ${missing[*]}"
        exit 1
    fi
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >&2
    apt-get install -q -y --no-install-recommends "${missing[@]}" >&2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$python is older than 3.11; Debian 12 or newer is needed"
    exit 1
fi

stamp=.venv/.setup
state=$(cat pyproject.toml tools/setup.sh | sha256sum)
if [[ ! -f $stamp || $(<"$stamp") != "$state" ]]; then
    say "filling .venv"
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    .venv/bin/python - <<'END' >.venv/requirements.txt
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["dev"]))
END
    .venv/bin/python -m pip install -q --disable-pip-version-check --compile -r .venv/requirements.txt >&2
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # The checkout itself is what runs. A plain path and a plain script instead of pip's editable install, whose import
    # hooks and `import re` every start of pyvmm would pay for; the same goes for setuptools' hook.
    pwd >"$site/pyvmm-checkout.pth"
    rm -f "$site/distutils-precedence.pth"
    cat >.venv/bin/pyvmm <<END
#!$PWD/.venv/bin/python
from pyvmm.cli import entry
entry()
END
    chmod +x .venv/bin/pyvmm
    echo "$state" >"$stamp"
fi

make -s ext
# PYTHONDONTWRITEBYTECODE, where it is set, would leave every start to compile everything anew.
.venv/bin/python -m compileall -q pyvmm devices enlightenments guests tests
