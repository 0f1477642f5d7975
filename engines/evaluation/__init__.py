"""Questions with known answers, and what an answer is worth."""
