"""The README's screenshot of a report, as the browser chromium shows it.

accelerate launch train.py --output_dir outputs/report --learning_curve
python -m benchmarks.screenshot outputs/report/report.html docs/report.png
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from benchmarks._common import build_parser


def main() -> None:
    """Take the screenshot."""
    parser = build_parser(__doc__)
    parser.add_argument("report", type=Path, help="a report.html")
    parser.add_argument("png", type=Path, help="the file to write")
    args = parser.parse_args()
    take(args.report, args.png)


def take(report: Path, png: Path, height: int = 1100) -> None:
    """Write the top of a page as a PNG of 1,000 pixels in width."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": height})
        page.goto(report.resolve().as_uri())
        page.screenshot(path=png)
        browser.close()


if __name__ == "__main__":
    main()
