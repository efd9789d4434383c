"""What the steps of a run do to observed answers, predicted before each of them and compared with what happened."""
