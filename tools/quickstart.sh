#!/usr/bin/env bash
# The whole way, from nothing: installs into .venv, draws a data set, trains a captioner on it,
# captions images it hasn't seen, and scores the captions. Needs no GPU and no download but the
# packages.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
install_captioner

started=$SECONDS
python=.venv/bin/python
run=runs/quickstart
rm -rf "$run"

echo "== Drawing the data set"
$python tools/make_shapes.py shapes
echo "== Training"
$python tools/train.py experiments/shapes.toml --output-dir "$run"
echo "== Captioning images that the captioner hasn't seen"
$python tools/caption_folder.py "$run/best" shapes/images/test \
    --annotations shapes/annotations/captions_test.json --output "$run/captions.json"
$python tools/contact_sheet.py "$run/captions.json" shapes/images/test \
    --annotations shapes/annotations/captions_test.json --output "$run/captions.png"
echo "== Scoring"
$python tools/evaluate_bleu.py --references shapes/annotations/captions_test.json \
    --hypotheses "$run/captions.json" --output "$run/scores.json"
$python tools/check_shapes.py --scenes shapes/annotations/scenes_test.json \
    --hypotheses "$run/captions.json"
echo
echo "Done in $((SECONDS - started)) s. Look at $run/captions.png; the README shows the same three"
echo "steps on your own images."
