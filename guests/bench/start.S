/* Entry as the Multiboot specification says (32-bit protected mode, EBX = information), long mode, user mode and back. */
#define PAGE_SIZE 4096
#define STACK_SIZE 16384

#define CODE32 0x08
#define CODE64 0x10
#define DATA 0x18
#define USER_DATA 0x23
#define USER_CODE 0x2b

#define CR0_WANTED 0x80010033 /* PG WP NE ET MP PE */
#define CR4_WANTED 0x620      /* OSXMMEXCPT OSFXSR PAE */
#define EFER 0xc0000080
#define EFER_LME 0x100

#define USER_FLAGS 0x2 /* interrupts off */

    .section .text.entry, "ax"
    .code32
    .balign 4
    .long 0x1badb002, 0, -0x1badb002
    .globl bench_entry
bench_entry:
    cli
    cld
    lgdt gdt_pointer
    ljmp $CODE32, $1f
1:  mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %eax, %fs
    mov %eax, %gs
    mov $CR4_WANTED, %eax
    mov %eax, %cr4
    mov $page_root, %eax
    mov %eax, %cr3
    mov $EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov $CR0_WANTED, %eax
    mov %eax, %cr0
    ljmp $CODE64, $long_mode
    .code64
long_mode:
    mov $stack + STACK_SIZE, %esp
    mov %ebx, %edi
    call bench_main
1:  cli
    hlt
    jmp 1b

    .text
/* void run_as_user(void (*job)(void)) */
    .globl run_as_user
run_as_user:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, supervisor_stack
    mov %rsp, %rax
    push $USER_DATA
    push %rax
    push $USER_FLAGS
    push $USER_CODE
    push $1f
    iretq
1:  sub $8, %rsp
    call *%rdi
    .globl user_end
user_end:
    ud2

/* Goes on behind run_as_user(). */
    .globl leave_user
leave_user:
    mov supervisor_stack, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

/* u64 hypercall_64(u64 control, u64 input, u64 output): RCX, RDX, R8; result in RAX. */
    .globl hypercall_64
hypercall_64:
    mov %rdi, %rcx
    mov %rdx, %r8
    mov %rsi, %rdx
    mov $hypercall_page, %eax
    jmp *%rax

    .data
    .balign 16
    .globl gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .quad 0, 0 /* the task state segment: main.c fills it in */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

/* The first 4 GiB, each 2 MiB page mapped to itself, writable, for user mode too. */
    .balign PAGE_SIZE
page_root:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
page_directory_pointers:
    .quad page_directory + 7, page_directory + 0x1007, page_directory + 0x2007, page_directory + 0x3007
    .fill 508, 8, 0
page_directory:
    .set page, 0
    .rept 2048
    .quad page + 0x87
    .set page, page + 0x200000
    .endr

    .bss
    .globl hypercall_page, trap_stack_end
    .balign PAGE_SIZE
hypercall_page:
    .skip PAGE_SIZE
stack:
    .skip STACK_SIZE
    .skip STACK_SIZE
trap_stack_end:
supervisor_stack:
    .skip 8

    .section .note.GNU-stack, "", @progbits
