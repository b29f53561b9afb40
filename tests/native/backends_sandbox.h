inline void test_in_sandboxes() {}
