#!/usr/bin/env bash
# What the tests of pages need besides Python packages: a Chromium, and axe-core in a cache folder.
# Those tests are skipped without either, so what cannot be fetched is only said.
set -u
axe_version=4.14.1
cache="${TOKENRATIO_BROWSER:-$HOME/.cache/tokenratio/browser}"

if [ -n "${TOKENRATIO_CHROMIUM:-}" ] || command -v chromium chromium-browser google-chrome >/dev/null; then
	echo "Chromium: installed"
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
		echo "Chromium: apt-get cannot install it; the tests of pages are skipped"
else
	echo "Chromium: not installed, and this is not root on Debian; the tests of pages are skipped"
fi

if [ -f "$cache/axe-core/axe.min.js" ]; then
	echo "axe-core: in $cache"
elif command -v npm >/dev/null; then
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	if (cd "$work" && npm pack --silent "axe-core@$axe_version" >/dev/null && tar -xzf axe-core-*.tgz); then
		mkdir -p "$cache/axe-core"
		mv "$work/package/axe.min.js" "$work/package/LICENSE" "$cache/axe-core/"
		echo "axe-core: fetched into $cache"
	else
		echo "axe-core: npm cannot fetch it; its checks are skipped"
	fi
else
	echo "axe-core: npm is not installed; its checks are skipped"
fi
