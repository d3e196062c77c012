"""The names of a run's files and folders, in its directory."""

CARD = "README.md"  # the model card
EARLIER_CARD = ".earlier_card.md"  # of a run that goes on; the next card keeps what a person has added to it
METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
AUDIT = "audit.json"
REPORT = "report.html"
CODE = "models.py"  # of a model that brings its own
CONFIG = "config.json"  # of the model
LEARNED_FROM = "learned_from.txt"  # digests of the images that a model has learned from
DIGEST = 16  # their first hexadecimal digits, which are enough there
IMAGES = "images.json"  # the options that load a run's images again on this machine, and which of them are of test
RACE = "race.json"  # from which an interrupted race goes on
BACKBONE = "backbone.txt"  # which one `--model_name auto` has chosen
SCORED = "scored"  # folder of the scored weights, where others are shipped
REFIT = "refit"  # folder of the refit's checkpoints
ONNX = "onnx"  # folder of exported files, as transformers.js names them
ONNX_FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
EXPORTS = "export.json"  # how they compare with the model
WRITTEN = {  # by a run or an audit, besides weights and figures
    CARD, METRICS, PREDICTIONS, AUDIT, "audit.html", REPORT, CODE, CONFIG, "preprocessor_config.json", LEARNED_FROM,
    IMAGES, RACE, BACKBONE, EXPORTS,
}  # fmt: skip
