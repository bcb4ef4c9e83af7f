"""Pictures from a stock server of language models (docs/stock-servers.md).

    vllm serve EXPORT/model &
    python examples/paint_with_server.py EXPORT "a red circle" --num 4 --out pictures

EXPORT is what `arra export` wrote. The server holds the weights; here, the prompts are put into the
model's words and its codes into pixels. No server knows guidance: a model trained with
`arra train cca` needs none.
"""

import argparse
import sys
from pathlib import Path

from arra.integrations.stock_server import ServedPainter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", help="the exported folder")
    parser.add_argument("prompts", nargs="+", help="what to paint")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--name", help="of the model there, if it serves several")
    parser.add_argument("--out", required=True, help="folder of the pictures")
    parser.add_argument("--num", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt")
    parser.add_argument("--temperature", type=float, help="0 = always the likeliest code")
    parser.add_argument("--top-k", type=int, help="0 = all codes")
    parser.add_argument("--top-p", type=float, help="1 = all codes")
    asked = parser.parse_args()
    painter = ServedPainter(asked.export, asked.url, asked.name)
    prompts = [prompt for prompt in asked.prompts for _ in range(asked.num)]
    seeds = [asked.seed + number for _ in asked.prompts for number in range(asked.num)]
    pictures = painter(
        prompts, seeds, temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p
    )
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        file = out / f"{number // asked.num:05d}-{number % asked.num}.png"
        picture.save(file)
        print(file)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"paint_with_server: {error}")
