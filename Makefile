# Pages that follow from data in the repository. With RUNS=FOLDER, first the data, from what `writesae reproduce --published` left there.
.PHONY: results tutorials
results:
	python study/tools/results.py $(RUNS)

# Run the tutorials in an empty folder and save their outputs; where a cell raises, the files stay as they were.
tutorials:
	folder=$$(mktemp -d) && cp tutorials/*.ipynb $$folder && cd $$folder && \
	PYTHONWARNINGS=ignore TQDM_DISABLE=1 PYTHONPATH=$(CURDIR) jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False *.ipynb && mv *.ipynb $(CURDIR)/tutorials
