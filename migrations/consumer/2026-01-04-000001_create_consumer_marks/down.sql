DROP TABLE consumer_marks;
