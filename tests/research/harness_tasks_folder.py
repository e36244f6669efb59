"""A folder with tasks of lm-evaluation-harness, as YAML beside the documents."""

import json
import pathlib
from typing import Any


def write_task(folder: pathlib.Path, name: str, documents: list[dict[str, Any]], **config: Any
               ) -> None:
  """Writes a task whose documents lie in a file of lines beside it; JSON is YAML, too."""
  folder.mkdir(parents=True, exist_ok=True)
  data = folder / f'{name}.jsonl'
  data.write_text(''.join(json.dumps(document) + '\n' for document in documents))
  whole = {'task': name, 'dataset_path': 'json', 'test_split': 'test',
           'dataset_kwargs': {'data_files': {'test': str(data)}}, **config}
  (folder / f'{name}.yaml').write_text(json.dumps(whole))


def write_choices(folder: pathlib.Path, name: str, documents: list[dict[str, Any]], **more: Any
                  ) -> None:
  """Writes a task of documents with `q`, `choices` and `gold`, the number of the right one."""
  write_task(folder, name, documents, output_type='multiple_choice', doc_to_text='{{q}}',
             doc_to_choice='{{choices}}', doc_to_target='gold',
             metric_list=[{'metric': 'acc'}, {'metric': 'acc_norm'}], **more)


def write_texts(folder: pathlib.Path, name: str, texts: list[str]) -> None:
  """Writes a task of texts that are scored as a whole."""
  write_task(folder, name, [{'page': text} for text in texts], doc_to_text='',
             output_type='loglikelihood_rolling', doc_to_target='{{page}}',
             metric_list=[{'metric': 'word_perplexity'}, {'metric': 'bits_per_byte'}])


def write_questions(folder: pathlib.Path, name: str, documents: list[dict[str, Any]],
                    **generation_kwargs: Any) -> None:
  """Writes a task of documents with `q` and `a`, the text that is to be generated."""
  write_task(folder, name, documents, output_type='generate_until', doc_to_text='{{q}}',
             doc_to_target='a', generation_kwargs=generation_kwargs,
             metric_list=[{'metric': 'exact_match'}])
